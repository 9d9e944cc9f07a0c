// Work units, handed out one by one to whichever thread is free. Which thread takes a unit never changes its result.
#pragma once

#include <atomic>

#include "arena.h"
#include "parallel.h"

namespace moe {

enum class UnitOrder : int8_t {
  kAscending,
  // Costliest first, and every other thread begins at the end: an expert with many rows keeps a core busy multiplying,
  // one with few waits for memory, and side by side they take less time. A thread's units then follow each other.
  kFromBothEnds,
};

// What is left of the units of one call.
class UnitsLeft {
 public:
  UnitsLeft(int64_t count, int64_t threads, UnitOrder order)
      : count_(count), threads_(threads), both_ends_(order == UnitOrder::kFromBothEnds) {}

  // The next unit of a thread, or -1.
  int64_t take(int64_t thread) {
    if (taken_.fetch_add(1, std::memory_order_relaxed) >= count_) return -1;
    if (from_back(thread)) return count_ - 1 - back_.fetch_add(1, std::memory_order_relaxed);
    return front_.fetch_add(1, std::memory_order_relaxed);
  }

  // The one after that, if units take about equally long, or -1: worth fetching.
  int64_t upcoming(int64_t thread, int64_t unit) const {
    const int64_t others = both_ends_ ? threads_ / 2 : 0;  // that begin at the end
    const int64_t next = from_back(thread) ? unit - others : unit + threads_ - others;
    return next < count_ ? next : -1;
  }

 private:
  bool from_back(int64_t thread) const { return both_ends_ && thread % 2 != 0; }

  int64_t count_, threads_;
  bool both_ends_;
  std::atomic<int64_t> taken_{0}, front_{0}, back_{0};
};

// Runs worker.run(unit), or worker.run(unit, upcoming), for every unit in [0, count) on all threads. Each thread makes
// its own worker by make_worker(arena), after `scratch_bytes` have been reserved in its arena. False when memory ran
// out.
template <typename MakeWorker>
bool run_units(const ThreadPool& pool, int64_t count, size_t scratch_bytes, const MakeWorker& make_worker,
               UnitOrder order = UnitOrder::kAscending) {
  if (count <= 0) return true;
  const int64_t threads = std::min<int64_t>(std::max(pool.num_threads(), 1), count);
  UnitsLeft left(count, threads, order);
  std::atomic<bool> ok{true};
  parallel_chunks(pool, threads, threads, [&](int64_t thread, int64_t, int64_t) {
    Arena& arena = Arena::of_this_thread();
    if (!arena.reset(scratch_bytes)) {
      ok.store(false, std::memory_order_relaxed);
      return;
    }
    auto worker = make_worker(arena);
    for (int64_t unit; (unit = left.take(thread)) >= 0;) {
      if constexpr (requires { worker.run(unit, unit); }) {
        worker.run(unit, left.upcoming(thread, unit));
      } else {
        worker.run(unit);
      }
    }
  });
  return ok.load(std::memory_order_relaxed);
}

}  // namespace moe
