// Work units, handed out one by one to whichever thread is free. Which thread takes a unit never changes its result.
#pragma once

#include <atomic>

#include "arena.h"
#include "parallel.h"

namespace moe {

// Runs worker.run(unit) for every unit in [0, count), in order of their numbers, on all threads. Each thread makes its
// own worker by make_worker(arena), after `scratch_bytes` have been reserved in its arena. False when memory ran out.
template <typename MakeWorker>
bool run_units(const ThreadPool& pool, int64_t count, size_t scratch_bytes, const MakeWorker& make_worker) {
  if (count <= 0) return true;
  std::atomic<int64_t> next{0};
  std::atomic<bool> ok{true};
  const int64_t threads = std::min<int64_t>(std::max(pool.num_threads(), 1), count);
  parallel_chunks(pool, threads, threads, [&](int64_t, int64_t, int64_t) {
    Arena& arena = Arena::of_this_thread();
    if (!arena.reset(scratch_bytes)) {
      ok.store(false, std::memory_order_relaxed);
      return;
    }
    auto worker = make_worker(arena);
    for (;;) {
      const int64_t unit = next.fetch_add(1, std::memory_order_relaxed);
      if (unit >= count) return;
      worker.run(unit);
    }
  });
  return ok.load(std::memory_order_relaxed);
}

}  // namespace moe
