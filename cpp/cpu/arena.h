// Scratch memory of one thread, kept between calls, so that a small call does not pay for fresh pages.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>

namespace moe {

class Arena {
 public:
  static constexpr size_t kAlignment = 64;    // a cache line, and the widest vector
  static constexpr size_t kKept = 32u << 20;  // a larger block is given back at the next, smaller, call

  Arena() = default;
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  ~Arena() { std::free(block_); }

  static Arena& of_this_thread() {
    static thread_local Arena arena;
    return arena;
  }

  // Forgets everything taken before and makes room for `bytes`, not initialised. False when there is no memory.
  bool reset(size_t bytes) {
    used_ = 0;
    bytes = round_up(bytes);
    if (bytes <= size_ && (size_ <= kKept || bytes > kKept)) return true;
    std::free(block_);
    block_ = static_cast<char*>(std::aligned_alloc(kAlignment, bytes));
    size_ = block_ ? bytes : 0;
    return block_ != nullptr;
  }

  // The next n elements; the caller has reserved them with reset.
  template <typename T>
  T* take(int64_t n) {
    T* out = reinterpret_cast<T*>(block_ + used_);
    used_ += size_of_block<T>(n);
    return out;
  }

  template <typename T>
  static size_t size_of_block(int64_t n) {
    return round_up(static_cast<size_t>(n) * sizeof(T));
  }

 private:
  // NOTE: 64 extra bytes keep blocks whose size is a power of two from falling into the same cache sets.
  static size_t round_up(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment + kAlignment; }

  char* block_ = nullptr;
  size_t size_ = 0, used_ = 0;
};

}  // namespace moe
