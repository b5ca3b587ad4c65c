#include "limits/limits.hpp"

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <functional>
#include <memory>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "common/amx.hpp"
#include "common/thread_pool.hpp"
#include "limits/amx.hpp"
#include "limits/avx512.hpp"

namespace tael {
namespace {

constexpr int kPasses = 5;
constexpr size_t kHugePage = size_t(2) << 20;

// Seconds of the middle one of several passes.
double median_s(int num_threads, const std::function<void(int)>& pass) {
  using Clock = std::chrono::steady_clock;
  ThreadPool pool(num_threads);
  std::array<double, kPasses> seconds;
  for (double& s : seconds) {
    const Clock::time_point start = Clock::now();
    pool.run(pass);
    s = std::chrono::duration<double>(Clock::now() - start).count();
  }
  std::nth_element(seconds.begin(), seconds.begin() + kPasses / 2, seconds.end());
  return seconds[kPasses / 2];
}

// Sums num_bytes, which is of no interest, but so the loads must happen. Four places at a time
// and a prefetch 4 KiB ahead into the L2 cache read faster on Zen 4 than one place, no prefetch or one into L1.
uint64_t read_all(const uint8_t* data, int64_t num_bytes) {
  using Words = uint64_t __attribute__((vector_size(16)));
  constexpr int kStreams = 4, kAhead = 4096;
  const int64_t length = num_bytes / kStreams / 64 * 64;
  Words sums[kStreams] = {};
  for (int64_t i = 0; i < length; i += 64)
    for (int k = 0; k < kStreams; ++k) {
      const uint8_t* place = data + k * length + i;
      __builtin_prefetch(place + kAhead, 0, 2);
      const Words* line = reinterpret_cast<const Words*>(place);
      sums[k] += (line[0] + line[1]) + (line[2] + line[3]);
    }
  const Words total = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  return total[0] + total[1];
}

std::atomic<uint64_t> sink;

#if defined(__x86_64__)
constexpr int64_t kRounds = 1 << 20;

double ops_per_s(int num_threads, int ops_per_round, const std::function<void(int)>& pass) {
  return double(num_threads) * kRounds * ops_per_round / median_s(num_threads, pass);
}

constexpr int kProductBytes = 16 * 64 * 16;
#endif

}  // namespace

double read_bytes_per_s(int num_threads, int64_t num_bytes) {
  const int64_t share = num_bytes / num_threads / 256 * 256;
  struct Free { void operator()(uint8_t* p) const { std::free(p); } };
  const std::unique_ptr<uint8_t, Free> data(static_cast<uint8_t*>(std::aligned_alloc(kHugePage, share * num_threads)));
  if (!data) throw std::bad_alloc();
#if defined(__linux__)
  madvise(data.get(), share * num_threads, MADV_HUGEPAGE);  // as a model's weights; where there are none, less is read
#endif
  std::fill_n(data.get(), share * num_threads, 1);  // so that every page is there
  const double seconds = median_s(num_threads, [&](int thread) {
    sink = read_all(data.get() + thread * share, share);
  });
  return double(share * num_threads) / seconds;
}

std::optional<double> int8_ops_per_s([[maybe_unused]] int num_threads) {
#if defined(__x86_64__)
  if (has_tiles())
    return ops_per_s(num_threads, 2 * kProductBytes * kProductsPerRound, [](int) { multiply_int8_tiles(kRounds); });
  if (__builtin_cpu_supports("avx512vnni"))
    return ops_per_s(num_threads, 2 * 64 * kDotsPerRound, [](int) { sink = uint64_t(dot_int8_rounds(kRounds)); });
#endif
  return {};
}

std::optional<double> bf16_flops_per_s([[maybe_unused]] int num_threads) {
#if defined(__x86_64__)
  if (has_tiles())
    return ops_per_s(num_threads, kProductBytes * kProductsPerRound, [](int) { multiply_bf16_tiles(kRounds); });
  if (__builtin_cpu_supports("avx512bf16"))
    return ops_per_s(num_threads, 2 * 32 * kDotsPerRound, [](int) { sink = uint64_t(dot_bf16_rounds(kRounds)); });
#endif
  return {};
}

}  // namespace tael
