// Loops over the caller's thread pool.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>

#include "moe/huge_pages.h"
#include "moe/types.h"

namespace moe {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Items that make `work` together; an item may be no work at all.
constexpr int64_t items_of_work(int64_t work, int64_t work_per_item) {
  return ceil_div(work, std::max<int64_t>(work_per_item, 1));
}

// How many chunks of at least `grain` items are worth making of n items. Never more than there are threads.
inline int64_t num_chunks(const ThreadPool& pool, int64_t n, int64_t grain) {
  return std::clamp<int64_t>(ceil_div(n, std::max<int64_t>(grain, 1)), 1, std::max(pool.num_threads(), 1));
}

// Calls fn(chunk, begin, end) for `chunks` equal runs that cover [0, n). One chunk has one thread, so scratch memory
// and partial results can be indexed by chunk.
template <typename Fn>
void parallel_chunks(const ThreadPool& pool, int64_t n, int64_t chunks, const Fn& fn) {
  if (n <= 0) return;
  if (chunks <= 1) return fn(int64_t{0}, int64_t{0}, n);
  struct Context {
    const Fn& fn;
    int64_t n, chunks;
  } context{fn, n, chunks};
  auto task = [](int64_t begin, int64_t end, void* pointer) {
    const auto& [fn, n, chunks] = *static_cast<Context*>(pointer);
    const int64_t size = n / chunks, rest = n % chunks;  // the first `rest` chunks have one item more
    for (int64_t c = begin; c < end; ++c) {
      const int64_t first = c * size + std::min(c, rest);
      fn(c, first, first + size + (c < rest ? 1 : 0));
    }
  };
  pool.run(chunks, task, &context);
}

// Calls fn(begin, end) on disjoint ranges that cover [0, n), none much smaller than `grain`.
template <typename Fn>
void parallel_for(const ThreadPool& pool, int64_t n, int64_t grain, const Fn& fn) {
  parallel_chunks(pool, n, num_chunks(pool, n, grain), [&](int64_t, int64_t begin, int64_t end) { fn(begin, end); });
}

// Scratch memory that does not throw: false when there is none.
template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t n) : data_(new (std::nothrow) T[static_cast<size_t>(n)]) {
    if (data_) advise_huge_pages(data_.get(), static_cast<size_t>(n) * sizeof(T));
  }
  explicit operator bool() const { return data_ != nullptr; }
  T* get() const { return data_.get(); }

 private:
  std::unique_ptr<T[]> data_;
};

}  // namespace moe
