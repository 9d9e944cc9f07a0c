// mbarrier: a barrier in shared memory that counts arrivals and bytes, sm_90 (9.7.13.15).
#pragma once

#include "ptx/define.cuh"

#if MOE_PTX_SM90
namespace moe::cuda::ptx {

// 9.7.13.15.9 mbarrier.init: a phase ends after `arrivals` arrivals and all announced bytes.
MOE_DEVICE void mbar_init(uint32_t mbar, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(mbar), "r"(arrivals) : "memory");
}

// 9.7.13.15.10 mbarrier.inval: the eight bytes may be used otherwise afterwards.
MOE_DEVICE void mbar_inval(uint32_t mbar) {
  asm volatile("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(mbar) : "memory");
}

// 9.7.13.15.13 mbarrier.arrive
MOE_DEVICE void mbar_arrive(uint32_t mbar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(mbar) : "memory");
}

// The same at the mbarrier of another block of the cluster; the address comes from mapa. The scope is the default, the
// own block, so the other one learns that the threads have come, and nothing of what they wrote: with the cluster's
// scope nvcc 13.0 makes each arrival a fence of the whole GPU (MEMBAR.ALL.GPU), which the main loop would pay for every
// stage.
MOE_DEVICE void mbar_arrive_cluster(uint32_t mapped) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(mapped) : "memory");
}

// 9.7.13.15.13 mbarrier.arrive.expect_tx: an arrival that first announces `bytes` to come.
MOE_DEVICE void mbar_arrive_expect_tx(uint32_t mbar, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(mbar), "r"(bytes) : "memory");
}

// 9.7.13.15.11 mbarrier.expect_tx: announces bytes without arriving.
MOE_DEVICE void mbar_expect_tx(uint32_t mbar, uint32_t bytes) {
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(mbar), "r"(bytes) : "memory");
}

// 9.7.13.15.16 mbarrier.try_wait: whether the phase of this parity has ended; may suspend the thread for a while. Of a
// fresh barrier the phase of parity 1 counts as ended.
MOE_DEVICE bool mbar_try_wait(uint32_t mbar, uint32_t parity) {
  uint32_t ended;
  asm volatile(
      "{\n.reg .pred p;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n}\n"
      : "=r"(ended)
      : "r"(mbar), "r"(parity)
      : "memory");
  return ended;
}
MOE_DEVICE void mbar_wait(uint32_t mbar, uint32_t parity) {
  while (!mbar_try_wait(mbar, parity)) {
  }
}

// 9.7.13.4 fence.mbarrier_init: initialised mbarriers become visible to the cluster, and to the asynchronous proxy.
MOE_DEVICE void fence_mbar_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// 9.7.13.4 fence.proxy.async: ordinary accesses to shared memory before it are ordered before asynchronous ones (TMA,
// wgmma) after it.
MOE_DEVICE void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

}  // namespace moe::cuda::ptx
#endif
