#include "moe/floor.h"

#include <algorithm>
#include <atomic>
#include <chrono>

#include "gemm/kernels.h"
#include "parallel.h"

namespace moe {
namespace {

// The best rate of `round`, which returns the work that it did, over at least `seconds` and so many rounds.
template <typename Round>
double best_rate(int least, double seconds, const Round& round) {
  using Clock = std::chrono::steady_clock;
  const auto elapsed = [](Clock::time_point from) {
    return std::chrono::duration<double>(Clock::now() - from).count();
  };
  const auto start = Clock::now();
  double best = 0;
  for (int rounds = 0; rounds < least || elapsed(start) < seconds; ++rounds) {
    const auto from = Clock::now();
    const double work = round();
    best = std::max(best, work / elapsed(from));
  }
  return best;
}

constexpr int64_t kMostLanes = 16;  // of any instruction set's vectors of fp32

template <typename Real>
double fma_rate(double seconds, const ThreadPool& pool) {
  const auto& table = kernels<Real>();
  const int64_t threads = std::max(pool.num_threads(), 1);
  constexpr int64_t kRepeats = 200'000;  // about two milliseconds
  return best_rate(3, seconds, [&] {
    std::atomic<int64_t> fmas{0};
    parallel_chunks(pool, threads, threads, [&](int64_t, int64_t, int64_t) {
      Real sink = Real(0.001);
      fmas.fetch_add(table.fma_rounds(kRepeats, &sink), std::memory_order_relaxed);
    });
    return 2.0 * static_cast<double>(fmas.load());
  });
}

}  // namespace

double fma_rate_cpu(DType dtype, double seconds, const ThreadPool& pool) {
  return dtype == DType::kFloat64 ? fma_rate<double>(seconds, pool) : fma_rate<float>(seconds, pool);
}

double tile_rate_cpu(double seconds, const ThreadPool& pool) {
  const auto& table = kernels<float>();
  const int64_t threads = std::max(pool.num_threads(), 1);
  constexpr int64_t kDepth = 64, kRepeats = 2000;  // 16 KiB, half of a first-level cache
  const int64_t vectors = table.tile_vectors, rows = table.tile_rows(vectors), width = vectors * table.lanes;
  return best_rate(3, seconds, [&] {
    std::atomic<int64_t> fmas{0};
    parallel_chunks(pool, threads, threads, [&](int64_t, int64_t, int64_t) {
      alignas(64) float q[kDepth * kMaxTileVectors * kMostLanes], p[kMaxTileRows][kDepth];
      alignas(64) float c[kMaxTileRows * kMaxTileVectors * kMostLanes];
      std::fill_n(q, kDepth * width, 0.001f);
      const float* p_rows[kMaxTileRows];
      for (int64_t i = 0; i < rows; ++i) p_rows[i] = std::fill_n(p[i], kDepth, 1.0f) - kDepth;
      for (int64_t r = 0; r < kRepeats; ++r) {
        table.outer(static_cast<int>(rows), static_cast<int>(width), p_rows, q, width, kDepth, c, width,
                    TileStore::kWrite, {});
      }
      fmas.fetch_add(c[0] > 0 ? rows * width * kDepth * kRepeats : 0, std::memory_order_relaxed);
    });
    return 2.0 * static_cast<double>(fmas.load());
  });
}

MemoryReader::MemoryReader(int64_t bytes, const ThreadPool& pool)
    : pool_(pool), threads_(std::max(pool.num_threads(), 1)) {
  // NOTE: streams that begin at the same place of a page would meet in the same sets of the first-level cache.
  constexpr int64_t kPage = 4096 / sizeof(float), kShift = 64;
  const int64_t pages = bytes / (kParts * threads_ * kMaxTileRows * 4096);
  stream_ = pages * kPage - (kPage - kShift);
  if (pages < 1) return;
  const int64_t numbers = kParts * threads_ * kMaxTileRows * stream_;
  memory_.reset(new (std::nothrow) float[static_cast<size_t>(numbers)]);
  if (!memory_) return;
  advise_huge_pages(memory_.get(), static_cast<size_t>(numbers) * sizeof(float));
  // Written by the threads that will read it, so that the pages are near them.
  const int64_t each = numbers / threads_;
  parallel_chunks(pool_, threads_, threads_,
                  [&](int64_t thread, int64_t, int64_t) { std::fill_n(memory_.get() + thread * each, each, 1.0f); });
}

double MemoryReader::read() {
  return memory_ ? best_rate(1, 0, [&] { return read_part(); }) : 0;
}

double MemoryReader::best(double seconds) {
  return memory_ ? best_rate(kParts, seconds, [&] { return read_part(); }) : 0;
}

double MemoryReader::read_part() {
  const auto& table = kernels<float>();
  std::atomic<int64_t> seen{0};
  const int64_t numbers = kMaxTileRows * stream_;
  parallel_chunks(pool_, threads_, threads_, [&](int64_t thread, int64_t, int64_t) {
    const float* mine = memory_.get() + (thread * kParts + next_) * numbers;
    seen.fetch_add(table.read_streams(mine, stream_) > 0, std::memory_order_relaxed);
  });
  next_ = (next_ + 1) % kParts;
  return seen.load() > 0 ? static_cast<double>(threads_ * numbers * int64_t{sizeof(float)}) : 0;
}

}  // namespace moe
