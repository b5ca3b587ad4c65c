// Threads that run one function together and meet at barriers.
//
// A step of a model is one run(): every thread executes the same sequence of stages. Inside a
// stage the threads take items from a shared counter, so that a thread whose core is busy with
// something else simply takes fewer; barrier() ends the stage. Waiting spins briefly, then sleeps.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
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

  // Inside run(): calls fn(first, last) on chunks of [0, num_items) until none is left, then
  // waits for the other threads.
  template <class Fn> void parallel_for(int64_t num_items, int64_t chunk, Fn&& fn) {
    for (int64_t first; (first = next_item_.fetch_add(chunk, std::memory_order_relaxed)) < num_items;)
      fn(first, first + chunk < num_items ? first + chunk : num_items);
    barrier();
  }

 private:
  void work(int thread);
  void stop();
  void wait_for_change(const std::atomic<uint32_t>& value, uint32_t old) const;

  const int num_threads_;
  const std::function<void(int)>* fn_ = nullptr;
  bool stopping_ = false;
  alignas(64) std::atomic<uint32_t> run_{0};
  alignas(64) std::atomic<uint32_t> stage_{0};
  alignas(64) std::atomic<int> num_arrived_{0};
  alignas(64) std::atomic<int64_t> next_item_{0};
  std::vector<std::thread> threads_;
};

}  // namespace tael
