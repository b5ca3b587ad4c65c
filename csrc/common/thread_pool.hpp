// Threads that run one function together and meet at barriers.
//
// A step of a model is one run(): every thread executes the same sequence of stages. Inside a
// stage each thread takes items from its own share, in ascending order so that it reads memory as a
// stream, and then from the shares of others: a thread whose core is busy with something else
// simply takes fewer. barrier() ends the stage. Waiting spins briefly, then sleeps.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

namespace tael {

class ThreadPool {
 public:
  // Throws std::invalid_argument below one thread, std::system_error where one cannot start.
  explicit ThreadPool(int num_threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int num_threads() const { return num_threads_; }

  // Calls fn(thread) on every thread, 0 being the caller, and returns when all have finished.
  void run(const std::function<void(int)>& fn);

  // Inside run(): waits for all threads, then starts the next stage.
  void barrier();

  // Inside run(), by every thread: calls fn(item) for the items of [0, num_items) until none is
  // left, then waits for the other threads.
  template <class Fn> void parallel_for(int thread, int64_t num_items, Fn&& fn) {
    for (int i = 0; i < num_threads_; ++i) {
      const int owner = thread + i < num_threads_ ? thread + i : thread + i - num_threads_;
      const int64_t first = num_items * owner / num_threads_, count = num_items * (owner + 1) / num_threads_ - first;
      for (int64_t n; (n = shares_[owner].num_taken.fetch_add(1, std::memory_order_relaxed)) < count;) fn(first + n);
    }
    barrier();
  }

 private:
  struct alignas(64) Share {
    std::atomic<int64_t> num_taken{0};
  };

  void work(int thread);
  void stop();
  void wait_for_change(const std::atomic<uint32_t>& value, uint32_t old) const;

  const int num_threads_;
  const std::function<void(int)>* fn_ = nullptr;
  bool stopping_ = false;
  alignas(64) std::atomic<uint32_t> run_{0};
  alignas(64) std::atomic<uint32_t> stage_{0};
  alignas(64) std::atomic<int> num_arrived_{0};
  std::unique_ptr<Share[]> shares_;
  std::vector<std::thread> threads_;
};

}  // namespace tael
