#include "common/thread_pool.hpp"

#include <stdexcept>

namespace tael {
namespace {

// About 50 microseconds: longer than a stage of a small model, shorter than a scheduler tick.
constexpr int kSpins = 1500;

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

}  // namespace

ThreadPool::ThreadPool(int num_threads) : num_threads_(num_threads) {
  if (num_threads < 1) throw std::invalid_argument("a model needs at least one thread");
  shares_ = std::make_unique<Share[]>(num_threads);
  try {
    for (int t = 1; t < num_threads; ++t) threads_.emplace_back([this, t] { work(t); });
  } catch (...) {  // those that run would end the process
    stop();
    throw;
  }
}

ThreadPool::~ThreadPool() { stop(); }

void ThreadPool::stop() {
  stopping_ = true;
  run_.fetch_add(1, std::memory_order_seq_cst);
  run_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void ThreadPool::run(const std::function<void(int)>& fn) {
  fn_ = &fn;
  run_.fetch_add(1, std::memory_order_seq_cst);
  run_.notify_all();
  fn(0);
  barrier();
}

void ThreadPool::barrier() {
  const uint32_t stage = stage_.load(std::memory_order_relaxed);
  if (num_arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == num_threads_) {
    num_arrived_.store(0, std::memory_order_relaxed);
    for (int t = 0; t < num_threads_; ++t) shares_[t].num_taken.store(0, std::memory_order_relaxed);
    // Sequentially consistent: notify_all() skips the wake-up when it sees no waiter, and a plain
    // store may become visible only after that look (seen once in 70,000 tries): a lost wake-up.
    stage_.store(stage + 1, std::memory_order_seq_cst);
    stage_.notify_all();
  } else {
    wait_for_change(stage_, stage);
  }
}

void ThreadPool::work(int thread) {
  for (uint32_t seen = 0;;) {
    wait_for_change(run_, seen);
    seen = run_.load(std::memory_order_acquire);
    if (stopping_) return;
    (*fn_)(thread);
    barrier();
  }
}

void ThreadPool::wait_for_change(const std::atomic<uint32_t>& value, uint32_t old) const {
  for (int i = 0; i < kSpins; ++i) {
    if (value.load(std::memory_order_acquire) != old) return;
    pause();
  }
  value.wait(old, std::memory_order_acquire);
}

}  // namespace tael
