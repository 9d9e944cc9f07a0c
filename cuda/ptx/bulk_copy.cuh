// Bulk copies between global and shared memory: plain (cp.async.bulk) and by tensor map (TMA), sm_90.
#pragma once

#include "ptx/define.cuh"

#if MOE_PTX_SM90
namespace moe::cuda::ptx {

// 9.7.9.15 prefetch.tensormap
MOE_DEVICE void prefetch_tmap(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// 9.7.9.27.1.2 cp.async.bulk.tensor, global to shared: coordinates count elements, innermost first; what lies outside
// the tensor arrives as zeros and counts among the bytes all the same.
MOE_DEVICE void tma_load_2d(uint32_t dst, const CUtensorMap* map, uint32_t mbar, int x, int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          dst),
      "l"(map), "r"(mbar), "r"(x), "r"(y)
      : "memory");
}
MOE_DEVICE void tma_load_3d(uint32_t dst, const CUtensorMap* map, uint32_t mbar, int x, int y, int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::
          "r"(dst),
      "l"(map), "r"(mbar), "r"(x), "r"(y), "r"(z)
      : "memory");
}
// 9.7.9.18 createpolicy: what was loaded with this policy is the first that the L2 cache gives up.
MOE_DEVICE uint64_t evict_first() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
// For what no one reads again.
MOE_DEVICE void tma_load_3d_once(uint32_t dst, const CUtensorMap* map, uint32_t mbar, int x, int y, int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(dst),
      "l"(map), "r"(mbar), "r"(x), "r"(y), "r"(z), "l"(evict_first())
      : "memory");
}
// To the same address, with the same mbarrier address, of every block of the cluster whose bit is set in `blocks`.
MOE_DEVICE void tma_load_2d_multicast(uint32_t dst, const CUtensorMap* map, uint32_t mbar, uint16_t blocks, int x,
                                      int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%4, %5}], [%2], %3;" ::"r"(dst),
      "l"(map), "r"(mbar), "h"(blocks), "r"(x), "r"(y)
      : "memory");
}
MOE_DEVICE void tma_load_3d_multicast(uint32_t dst, const CUtensorMap* map, uint32_t mbar, uint16_t blocks, int x,
                                      int y, int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%4, %5, %6}], [%2], %3;" ::"r"(dst),
      "l"(map), "r"(mbar), "h"(blocks), "r"(x), "r"(y), "r"(z)
      : "memory");
}

// 9.7.9.27.1.2 cp.async.bulk.tensor, shared to global; what lies outside the tensor is not written.
MOE_DEVICE void tma_store_2d(const CUtensorMap* map, uint32_t src, int x, int y) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map), "r"(src),
               "r"(x), "r"(y)
               : "memory");
}
MOE_DEVICE void tma_store_3d(const CUtensorMap* map, uint32_t src, int x, int y, int z) {
  asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(map), "r"(src),
               "r"(x), "r"(y), "r"(z)
               : "memory");
}

// 9.7.9.25.4.1 cp.async.bulk: `bytes` and both addresses are multiples of 16.
MOE_DEVICE void bulk_load(uint32_t dst, const void* src, uint32_t bytes, uint32_t mbar) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(dst),
               "l"(src), "r"(bytes), "r"(mbar)
               : "memory");
}
MOE_DEVICE void bulk_store(void* dst, uint32_t src, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(dst), "r"(src), "r"(bytes)
               : "memory");
}

// 9.7.9.27.2.1 cp.async.bulk.commit_group: the bulk stores of this thread so far form a group.
MOE_DEVICE void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// 9.7.9.27.2.2 cp.async.bulk.wait_group: all but kPending groups have read their shared memory (.read), or are done.
template <int kPending>
MOE_DEVICE void tma_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}
template <int kPending>
MOE_DEVICE void tma_store_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace moe::cuda::ptx
#endif
