// Barriers of threads: named barriers of a block, cluster barriers, the election of a lane.
#pragma once

#include "ptx/define.cuh"

namespace moe::cuda::ptx {

// 9.7.13.1 bar.sync: waits until `threads` threads (a multiple of 32) have come to barrier `id`. __syncthreads() is 0.
MOE_DEVICE void bar_sync(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

// 9.7.13.1 bar.arrive: counts as come, without waiting.
MOE_DEVICE void bar_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

#if MOE_PTX_SM90
// 9.7.13.14 elect.sync: true in one lane of a full warp.
MOE_DEVICE bool elect_one() {
  uint32_t elected;
  asm volatile(
      "{\n.reg .pred p;\n"
      "elect.sync _|p, 0xffffffff;\n"
      "selp.u32 %0, 1, 0, p;\n}\n"
      : "=r"(elected)::"memory");
  return elected;
}

// 9.7.13.3 barrier.cluster: every thread of every block of the cluster. arrive releases, wait acquires.
MOE_DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
MOE_DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
MOE_DEVICE void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

// 10.16 %cluster_ctarank, 10.17 %cluster_nctarank
MOE_DEVICE uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
MOE_DEVICE uint32_t cluster_size() {
  uint32_t size;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}

// 9.7.9.23 mapa: the shared-window address that `address` has in the block of that rank.
MOE_DEVICE uint32_t mapa(uint32_t address, uint32_t rank) {
  uint32_t mapped;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(rank));
  return mapped;
}
#endif

}  // namespace moe::cuda::ptx
