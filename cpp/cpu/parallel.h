// Loops over the caller's thread pool.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>
#include <type_traits>
#include <utility>

#include "moe/huge_pages.h"
#include "moe/memory.h"
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

// Scratch memory that does not throw, of plain numbers, not initialised: false when there is none.
template <typename T>
class Scratch {
  static_assert(std::is_trivially_copyable_v<T>, "a large block is given back without destroying anything");

 public:
  explicit Scratch(int64_t n) {
    const size_t bytes = static_cast<size_t>(n) * sizeof(T);
    if (bytes < kLargeBlock) {
      small_.reset(new (std::nothrow) T[static_cast<size_t>(n)]);
    } else {
      large_ = take_block(bytes);
    }
  }
  Scratch(Scratch&& other) noexcept
      : small_(std::move(other.small_)), large_(std::exchange(other.large_, Block{nullptr, 0})) {}
  Scratch& operator=(Scratch&& other) noexcept {
    std::swap(small_, other.small_);
    std::swap(large_, other.large_);
    return *this;
  }
  ~Scratch() { give_block(large_); }

  explicit operator bool() const { return get() != nullptr; }
  T* get() const { return small_ ? small_.get() : static_cast<T*>(large_.data); }

 private:
  std::unique_ptr<T[]> small_;
  Block large_{nullptr, 0};
};

}  // namespace moe
