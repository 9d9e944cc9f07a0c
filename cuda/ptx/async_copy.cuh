// cp.async: 4, 8 or 16 bytes per thread from global to shared memory, sm_80 on.
#pragma once

#include "ptx/define.cuh"

namespace moe::cuda::ptx {

// 9.7.9.25.3.1 cp.async. src_bytes < kBytes fills the rest of dst with zeros; with 0, src is not read. Both addresses
// are aligned to kBytes. Only 16 bytes may bypass L1 (.cg).
template <int kBytes>
MOE_DEVICE void cp_async(uint32_t dst, const void* src, int src_bytes = kBytes) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "cp.async copies 4, 8 or 16 bytes");
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "r"(src_bytes) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(dst), "l"(src), "n"(kBytes), "r"(src_bytes)
                 : "memory");
}
MOE_DEVICE void cp_async16(uint32_t dst, const void* src, int src_bytes = 16) { cp_async<16>(dst, src, src_bytes); }

// 9.7.9.25.3.2 cp.async.commit_group
MOE_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// 9.7.9.25.3.3 cp.async.wait_group: at most kPending groups of this thread are still in flight.
template <int kPending>
MOE_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// 9.7.13.15.15 cp.async.mbarrier.arrive.noinc: arrives at the mbarrier once all earlier cp.async of this thread are
// done. The arrival counts among those that mbarrier_init announced.
MOE_DEVICE void cp_async_mbar_arrive_noinc(uint32_t mbar) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(mbar) : "memory");
}

}  // namespace moe::cuda::ptx
