// Large outputs on large pages: filling fresh memory costs half when it comes in 2 MiB pages, not 4 KiB ones.
#pragma once

#include <cstddef>
#include <cstdint>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace moe {

// Asks for huge pages under [data, data + bytes) when that is worth it. A hint: nothing fails when it is not followed.
inline void advise_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#if defined(__linux__)
  constexpr size_t kSmallest = size_t{4} << 20, kPage = 4096;
  if (bytes < kSmallest) return;
  const uintptr_t address = reinterpret_cast<uintptr_t>(data), first = (address + kPage - 1) / kPage * kPage;
  madvise(reinterpret_cast<void*>(first), bytes - (first - address), MADV_HUGEPAGE);
#endif
}

}  // namespace moe
