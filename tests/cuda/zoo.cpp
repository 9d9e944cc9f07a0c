// The zoo: small kernels with one mistake each, of which the emulator must say what it is, and correct ones beside
// them, of which it must say nothing. Run in the emulator alone: on a GPU most of them would just go wrong.
#include "zoo.h"

namespace moe::test::zoo {
namespace {

// ---- memory
__global__ void shared_past_the_end(float* g) {
  SMEM_DYN(float, s);
  s[thread()] = 1;
  __syncthreads();
  g[thread()] = s[thread() + 65];
}
__global__ void shared_uninitialised(float* g) {
  SMEM_DYN(float, s);
  g[thread()] = s[thread()];
}
__global__ void vector_load_misaligned(float* g) {
  SMEM_DYN(float, s);
  s[thread()] = 1;
  s[thread() + 64] = 2;
  __syncthreads();
  const float4 v = *reinterpret_cast<const float4*>(s + 1);
  g[thread()] = v.x + v.y * v.z + v.w;
}
__global__ void shared_beside_arrays(float* g) {
  SMEM_ARRAY(float, one, 1);
  one[0] = g[0];
}
__global__ void global_past_the_end(float* g) { g[kFloats + thread()] = 1; }
__global__ void local_past_the_end(float* g) {
  int big[9];
  big[0] = thread();
  const int last = static_cast<int>(8 + gridDim.x);  // 9, which the compiler must not know
  for (int i = 1; i <= last; ++i) big[i] = big[i - 1] + i;
  g[thread()] = static_cast<float>(big[8]);
}

// ---- threads of a block
__global__ void barrier_that_some_leave(float* g) {
  if (thread() < 40) __syncthreads();
  g[thread()] = 1;
}
__global__ void barrier_at_two_places(float* g) {
  if (thread() & 1)
    __syncthreads();
  else
    __syncthreads();
  g[thread()] = 1;
}
__global__ void barrier_of_too_many(float*) {
  if (thread() < 32) ptx::bar_sync(1, 64);
}
__global__ void syncwarp_for_syncthreads(float* g) {
  SMEM_DYN(float, s);
  s[thread()] = 1;
  __syncwarp();
  g[thread()] = s[(thread() + 32) % 64];
}
__global__ void implicit_warp_synchrony(float* g) {
  SMEM_DYN(float, s);
  s[thread()] = 1;
  g[thread()] = s[thread() ^ 1];
}
__global__ void overwritten_while_read(float* g) {
  SMEM_DYN(float, s);
  s[thread()] = 1;
  __syncthreads();
  g[thread()] = s[thread() ^ 32];
  s[thread()] = 2;
}
__global__ void counter_zeroed_late(float* g) {
  SMEM_ARRAY(int, count, 1);
  if (thread() == 0) count[0] = 0;
  atomicAdd(&count[0], 1);
  __syncthreads();
  g[thread()] = static_cast<float>(count[0]);
}
__global__ void shuffle_outside_the_mask(float* g) {
  g[thread()] = static_cast<float>(__shfl_sync(0xffff, thread(), 3));
}
__global__ void shuffle_under_divergence(float* g) {
  if (thread() % 32 < 16)
    g[thread()] = static_cast<float>(__shfl_sync(~0u, thread(), 3));
  else
    __syncwarp();
}
__global__ void endless_loop(float* g) {
  if (thread() == 0)
    while (*static_cast<volatile float*>(g) != 7) {
    }
}

// ---- asynchronous copies
__global__ void cp_async_misaligned(float* g) {
  SMEM_DYN(float, s);
  ptx::cp_async16(ptx::smem_u32(s + 4 * (thread() % 16)), g + 1);
  ptx::cp_async_wait<0>();
}
__global__ void cp_async_not_awaited(float* g) {
  SMEM_DYN(float, s);
  ptx::cp_async<4>(ptx::smem_u32(s + thread()), g + thread());
  ptx::cp_async_commit();
  g[64 + thread()] = s[thread()];
  ptx::cp_async_wait<0>();
}
__global__ void cp_async_without_barrier(float* g) {
  SMEM_DYN(float, s);
  ptx::cp_async<4>(ptx::smem_u32(s + thread()), g + thread());
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  g[64 + thread()] = s[thread() ^ 32];
}
__global__ void cp_async_left_behind(float* g) {
  SMEM_DYN(float, s);
  ptx::cp_async<4>(ptx::smem_u32(s + thread()), g + thread());
}
__global__ void bulk_store_without_proxy_fence(float* g) {
  SMEM_DYN(float, s);
  if (thread() < 4) s[thread()] = 1;
  __syncthreads();
  if (thread() == 0) {
    ptx::bulk_store(g, ptx::smem_u32(s), 16);
    ptx::tma_store_commit();
    ptx::tma_store_wait<0>();
  }
}
__global__ void bulk_store_overwritten(float* g) {
  SMEM_DYN(float, s);
  if (thread() > 0) return;
  for (int i = 0; i < 4; ++i) s[i] = 1;
  ptx::fence_proxy_async();
  ptx::bulk_store(g, ptx::smem_u32(s), 16);
  ptx::tma_store_commit();
  s[0] = 2;
  ptx::tma_store_wait<0>();
}
__global__ void bulk_load_left_behind(float* g) {
  SMEM_DYN(float, s);
  if (thread() > 0) return;
  ptx::mbar_init(barrier_at(s), 1);
  ptx::fence_mbar_init();
  ptx::bulk_load(ptx::smem_u32(s + 4), g, 16, barrier_at(s));
}

// ---- mbarriers
__global__ void mbarrier_uninitialised(float*) {
  SMEM_DYN(float, s);
  ptx::mbar_arrive(barrier_at(s));
}
__global__ void mbarrier_overwritten(float*) {
  SMEM_DYN(float, s);
  if (thread() > 0) return;
  ptx::mbar_init(barrier_at(s), 1);
  s[0] = 0;
  ptx::mbar_arrive(barrier_at(s));
}
__global__ void mbarrier_without_proxy_fence(float* g) {
  SMEM_DYN(float, s);
  if (thread() > 0) return;
  ptx::mbar_init(barrier_at(s), 1);
  ptx::mbar_arrive_expect_tx(barrier_at(s), 16);
  ptx::bulk_load(ptx::smem_u32(s + 4), g, 16, barrier_at(s));
  ptx::mbar_wait(barrier_at(s), 0);
}
__global__ void mbarrier_wrong_parity(float*) {
  SMEM_DYN(float, s);
  if (thread() > 0) return;
  ptx::mbar_init(barrier_at(s), 1);
  ptx::mbar_arrive(barrier_at(s));
  ptx::mbar_wait(barrier_at(s), 1);
}
__global__ void mbarrier_bytes_missing(float* g) {
  SMEM_DYN(float, s);
  if (thread() > 0) return;
  ptx::mbar_init(barrier_at(s), 1);
  ptx::fence_mbar_init();
  ptx::mbar_arrive_expect_tx(barrier_at(s), 32);
  ptx::bulk_load(ptx::smem_u32(s + 4), g, 16, barrier_at(s));
  ptx::mbar_wait(barrier_at(s), 0);
}
__global__ void mbarrier_too_many_bytes(float*) {
  SMEM_DYN(float, s);
  if (thread() > 0) return;
  ptx::mbar_init(barrier_at(s), 2);
  ptx::mbar_arrive_expect_tx(barrier_at(s), (1 << 20) - 16);
  ptx::mbar_arrive_expect_tx(barrier_at(s), 16);
}
__global__ void mbarrier_nobody_waits(float*) {
  SMEM_DYN(float, s);
  if (thread() > 0) return;
  ptx::mbar_init(barrier_at(s), 1);
  ptx::mbar_arrive(barrier_at(s));
  ptx::mbar_arrive(barrier_at(s));
}
__global__ void mbarrier_too_many_arrivals(float*) {
  SMEM_DYN(float, s);
  if (thread() > 0) return;
  ptx::mbar_init(barrier_at(s), 1);
  ptx::mbar_expect_tx(barrier_at(s), 16);  // so that the phase stays open
  ptx::mbar_arrive(barrier_at(s));
  ptx::mbar_arrive(barrier_at(s));
}

// ---- blocks
__global__ void two_blocks_write_a_byte(float* g) { g[thread()] = 1; }
__global__ void read_without_acquire(float* g) {
  if (blockIdx.x == 0) {
    g[thread()] = 1;
  } else {
    g[64 + thread()] = g[thread()];
  }
}
__global__ void flag_without_release(float* g) {
  auto* flag = reinterpret_cast<uint32_t*>(g + 127);
  if (thread() > 0) return;
  if (blockIdx.x == 0) {
    g[0] = 1;
    atomicExch(flag, 1u);
  } else {
    while (ptx::ld_acquire(flag) != 1) {
    }
    g[1] = g[0];
  }
}
__global__ void last_block_without_fence(float* g) {
  auto* count = reinterpret_cast<uint32_t*>(g + 127);
  if (thread() > 0) return;
  g[blockIdx.x] = 1;
  if (atomicAdd(count, 1u) == gridDim.x - 2) g[64] = g[0] + g[1];  // the count begins at 2^32 - 1
}
__global__ void registers_of_nobody(float*) {
  if (thread() < 128)
    ptx::setmaxnreg_dec<160>();  // 8 for two warpgroups that want 8 each
  else
    ptx::setmaxnreg_inc<176>();
}
__global__ void registers_released_upwards(float*) { ptx::setmaxnreg_dec<232>(); }
__global__ void registers_taken_downwards(float*) { ptx::setmaxnreg_inc<160>(); }
__global__ void cluster_arrives_twice(float*) {
  ptx::cluster_arrive();
  ptx::cluster_arrive();
}
__global__ void cluster_neighbour_not_ready(float*) {
  SMEM_DYN(float, s);
  if (thread() == 0 && ptx::cluster_rank() == 0) ptx::mbar_arrive_cluster(ptx::mapa(barrier_at(s), 1));
  ptx::cluster_sync();
}

// ---- beside the kernel before
__global__ void early_load(float* g) {
  const float x = g[thread()];
  ptx::grid_dependency_wait();
  g[thread()] = x;
}
__global__ void early_atomic(float* g) {
  if (thread() == 0) atomicAdd(g, 1.0f);
  ptx::grid_dependency_wait();
}
__global__ void early_cp_async(float* g) {
  SMEM_DYN(float, s);
  if (thread() == 0) ptx::cp_async16(ptx::smem_u32(s), g);
  ptx::cp_async_commit();
  ptx::grid_dependency_wait();
  ptx::cp_async_wait<0>();
}
__global__ void early_bulk_load(float* g) {
  SMEM_DYN(float, s);
  if (thread() > 0) return;
  const uint32_t bar = ptx::smem_u32(s + 64);
  ptx::mbar_init(bar, 1);
  ptx::fence_mbar_init();
  ptx::mbar_arrive_expect_tx(bar, 16);
  ptx::bulk_load(ptx::smem_u32(s), g, 16, bar);
  ptx::grid_dependency_wait();
  ptx::mbar_wait(bar, 0);
}

}  // namespace

TEST(wrong_memory) {
  expect("shared past the end", shared_past_the_end, {nullptr, "AddressSanitizer", "RACE"}, {.smem = 65 * 4});
  expect("shared uninitialised", shared_uninitialised, only_race("never written"));
  expect("vector load misaligned", vector_load_misaligned, only_asan("runtime error"));
  expect("global past the end", global_past_the_end, only_asan("AddressSanitizer"));
  expect("local past the end", local_past_the_end, only_asan("runtime error"));
}

TEST(wrong_threads) {
  expect("barrier that some leave", barrier_that_some_leave, always("exit"));
  expect("barrier at two places", barrier_at_two_places, always("diverged at an aligned barrier"));
  expect("barrier of too many", barrier_of_too_many, always("wait in barrier 1 (32 of 64 have come)"));
  expect("syncwarp for syncthreads", syncwarp_for_syncthreads, only_race("RACE"));
  expect("implicit warp synchrony", implicit_warp_synchrony, only_race("RACE"));
  expect("overwritten while read", overwritten_while_read, only_race("without a barrier in between"));
  expect("counter zeroed late", counter_zeroed_late, only_race("RACE"));
  expect("shuffle outside the mask", shuffle_outside_the_mask, always("is not in the mask"));
  expect("shuffle under divergence", shuffle_under_divergence, always("the warp diverged"));
  setenv("EMU_TIMEOUT", "1", 1);
  expect("endless loop", endless_loop, always("time limit"));
  unsetenv("EMU_TIMEOUT");
}

TEST(wrong_registers) {
  expect("registers of nobody", registers_of_nobody, always("wait in setmaxnreg.inc"), {.threads = 384});
  expect("registers released upwards", registers_released_upwards, always("by a warp that has 168"), {.threads = 384});
  expect("registers taken downwards", registers_taken_downwards, always("by a warp that has 168"), {.threads = 384});
}

TEST(wrong_copies) {
  expect("cp.async misaligned", cp_async_misaligned, always("is not aligned"));
  expect("cp.async not awaited", cp_async_not_awaited, only_race("still in flight"));
  expect("cp.async without barrier", cp_async_without_barrier, only_race("RACE"));
  expect("cp.async left behind", cp_async_left_behind, always("exits with cp.async in flight"));
  expect("bulk store without proxy fence", bulk_store_without_proxy_fence, only_race("without fence.proxy.async"));
  expect("bulk store overwritten", bulk_store_overwritten, only_race("while an asynchronous operation"));
  setenv("EMU_ASYNC", "0", 1);  // as late as possible
  expect("bulk load left behind", bulk_load_left_behind, always("exits with a bulk load in flight"));
  unsetenv("EMU_ASYNC");
}

TEST(wrong_mbarriers) {
  expect("uninitialised", mbarrier_uninitialised, always("is not initialised"));
  expect("overwritten", mbarrier_overwritten, always("was overwritten"));
  expect("without proxy fence", mbarrier_without_proxy_fence, only_race("without fence.proxy.async"));
  expect("wrong parity", mbarrier_wrong_parity, always("wait in mbarrier wait"));
  expect("bytes missing", mbarrier_bytes_missing, always("bytes missing"));
  expect("too many bytes", mbarrier_too_many_bytes, always("2^20 bytes or more to come"));
  expect("nobody waits", mbarrier_nobody_waits, always("before any wait saw the end"));
  expect("too many arrivals", mbarrier_too_many_arrivals, always("more than the 1 arrivals"));
}

TEST(wrong_blocks) {
  expect("two blocks write a byte", two_blocks_write_a_byte, only_race("already written in this launch"),
         {.blocks = 2});
  expect("read without acquire", read_without_acquire, only_race("without an order"), {.blocks = 2});
  expect("flag without release", flag_without_release, only_race("without an order"), {.blocks = 2});
  expect("last block without fence", last_block_without_fence, only_race("without an order"), {.blocks = 2});
  expect("cluster arrives twice", cluster_arrives_twice, always("a second barrier.cluster.arrive"));
  expect("cluster neighbour not ready", cluster_neighbour_not_ready, always("is not initialised"),
         {.blocks = 2, .cluster = 2});
  expect("too much shared memory", shared_uninitialised, always("without cudaFuncSetAttribute"), {.smem = 49 * 1024});
  expect("too much beside arrays", shared_beside_arrays, always("static and dynamic shared memory exceed 48 KB"),
         {.smem = 47 * 1024 + 4});
}

TEST(wrong_starts) {
  const Words words = only_race("before grid_dependency_wait()");
  expect("load", early_load, words, {.overlaps = true});
  expect("atomic", early_atomic, words, {.overlaps = true});
  expect("cp.async", early_cp_async, words, {.overlaps = true});
  expect("bulk load", early_bulk_load, words, {.overlaps = true});
}

}  // namespace moe::test::zoo
