#include "moe/floor.h"

#include <algorithm>
#include <atomic>
#include <chrono>

#include "gemm/kernels.h"
#include "parallel.h"

namespace moe {
namespace {

// The best rate of `round`, which returns the work that it did, over at least `seconds` and three rounds.
template <typename Round>
double best_rate(double seconds, const Round& round) {
  using Clock = std::chrono::steady_clock;
  const auto elapsed = [](Clock::time_point from) {
    return std::chrono::duration<double>(Clock::now() - from).count();
  };
  const auto start = Clock::now();
  double best = 0;
  for (int rounds = 0; rounds < 3 || elapsed(start) < seconds; ++rounds) {
    const auto from = Clock::now();
    const double work = static_cast<double>(round());
    best = std::max(best, work / elapsed(from));
  }
  return best;
}

template <typename Real>
double fma_rate(double seconds, const ThreadPool& pool) {
  const auto& table = kernels<Real>();
  const int64_t threads = std::max(pool.num_threads(), 1);
  constexpr int64_t kRepeats = 200'000;  // about two milliseconds
  return best_rate(seconds, [&] {
    std::atomic<int64_t> fmas{0};
    parallel_chunks(pool, threads, threads, [&](int64_t, int64_t, int64_t) {
      Real sink = Real(0.001);
      fmas.fetch_add(table.fma_rounds(kRepeats, &sink), std::memory_order_relaxed);
    });
    return 2 * fmas.load();
  });
}

}  // namespace

double fma_rate_cpu(DType dtype, double seconds, const ThreadPool& pool) {
  return dtype == DType::kFloat64 ? fma_rate<double>(seconds, pool) : fma_rate<float>(seconds, pool);
}

double read_bandwidth_cpu(int64_t bytes, double seconds, const ThreadPool& pool) {
  const auto& table = kernels<float>();
  const int64_t threads = std::max(pool.num_threads(), 1);
  const int64_t each = bytes / threads / (kMaxTileRows * int64_t{sizeof(float)});  // floats of one stream
  const int64_t numbers = each * kMaxTileRows * threads;
  const Scratch<float> memory(std::max<int64_t>(numbers, 1));
  if (!memory || each == 0) return 0;
  float* data = memory.get();
  // Written by the threads that will read it, so that the pages are near them.
  parallel_chunks(pool, threads, threads, [&](int64_t thread, int64_t, int64_t) {
    std::fill_n(data + thread * each * kMaxTileRows, each * kMaxTileRows, 1.0f);
  });
  return best_rate(seconds, [&] {
    std::atomic<int64_t> seen{0};
    parallel_chunks(pool, threads, threads, [&](int64_t thread, int64_t, int64_t) {
      seen.fetch_add(table.read_streams(data + thread * each * kMaxTileRows, each) > 0, std::memory_order_relaxed);
    });
    return seen.load() > 0 ? numbers * int64_t{sizeof(float)} : 0;
  });
}

}  // namespace moe
