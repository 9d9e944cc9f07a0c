// Addresses, and loads and stores with an order or a scope.
#pragma once

#include "ptx/define.cuh"

namespace moe::cuda::ptx {

// The 32-bit shared-window address that every instruction on shared memory takes (9.7.9.20, cvta).
MOE_DEVICE uint32_t smem_u32(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// 9.7.9.8 ld.acquire: what the writer did before its release is visible afterwards.
MOE_DEVICE uint32_t ld_acquire(const uint32_t* p) {
  uint32_t v;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
MOE_DEVICE int32_t ld_acquire(const int32_t* p) {
  return static_cast<int32_t>(ld_acquire(reinterpret_cast<const uint32_t*>(p)));
}
MOE_DEVICE uint64_t ld_acquire(const uint64_t* p) {
  uint64_t v;
  asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
  return v;
}

// 9.7.9.11 st.release
MOE_DEVICE void st_release(uint32_t* p, uint32_t v) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
MOE_DEVICE void st_release(int32_t* p, int32_t v) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
MOE_DEVICE void st_release(uint64_t* p, uint64_t v) {
  asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(p), "l"(v) : "memory");
}

// 9.7.13.6 red.release: an addition that also publishes what came before it.
MOE_DEVICE void red_release_add(uint32_t* p, uint32_t v) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
MOE_DEVICE void red_release_add(int32_t* p, int32_t v) {
  asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}

// 9.7.13.5 atom.acq_rel: the last of several blocks learns from it that it is the last.
MOE_DEVICE uint32_t atom_acq_rel_add(uint32_t* p, uint32_t v) {
  uint32_t old;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(old) : "l"(p), "r"(v) : "memory");
  return old;
}
MOE_DEVICE int32_t atom_acq_rel_add(int32_t* p, int32_t v) {
  int32_t old;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], %2;" : "=r"(old) : "l"(p), "r"(v) : "memory");
  return old;
}

}  // namespace moe::cuda::ptx
