// Correct kernels that look like those of zoo.cpp, for false alarms; and what a test can ask of the race build.
#include "zoo.h"

namespace moe::test::zoo {
namespace {

__global__ void tree_sum(float* g) {
  SMEM_DYN(float, s);
  s[thread()] = 1;
  for (int step = 32; step > 0; step /= 2) {
    __syncthreads();
    if (thread() < step) s[thread()] += s[thread() + step];
  }
  if (thread() == 0) g[0] = s[0];
}
__global__ void warp_exchange(float* g) {
  SMEM_DYN(float, s);
  for (int i = 0; i < 3; ++i) {
    s[thread()] = static_cast<float>(i);
    __syncwarp();
    g[thread()] = s[thread() ^ 1];
    __syncwarp();
  }
}
__global__ void named_barriers(float* g) {  // warp 0 fills, warp 1 empties
  SMEM_DYN(float, s);
  for (int i = 0; i < 4; ++i) {
    if (thread() < 32) {
      if (i > 0) ptx::bar_sync(2, 64);
      s[thread()] = static_cast<float>(i);
      ptx::bar_arrive(1, 64);
    } else {
      ptx::bar_sync(1, 64);
      g[thread()] = s[thread() - 32];
      if (i < 3) ptx::bar_arrive(2, 64);
    }
  }
}
__global__ void cp_async_ring(float* g) {
  SMEM_DYN(float, s);
  for (int i = 0; i < 4; ++i) {
    ptx::cp_async<4>(ptx::smem_u32(s + i % 2 * 64 + thread()), g + thread());
    ptx::cp_async_commit();
    if (i == 0) continue;
    ptx::cp_async_wait<1>();
    __syncthreads();
    (void)*static_cast<volatile float*>(s + (i - 1) % 2 * 64 + (thread() ^ 32));
    __syncthreads();
  }
  ptx::cp_async_wait<0>();
}
__global__ void mbarrier_ring(float* g) {  // thread 0 loads, warp 1 consumes
  SMEM_DYN(float, s);
  const uint32_t full = barrier_at(s), empty = full + 8;
  if (thread() == 0) {
    ptx::mbar_init(full, 1);
    ptx::mbar_init(empty, 32);
    ptx::fence_mbar_init();
  }
  __syncthreads();
  for (uint32_t i = 0; i < 4; ++i) {
    if (thread() == 0) {
      ptx::mbar_wait(empty, i % 2 ^ 1);
      ptx::mbar_arrive_expect_tx(full, 128);
      ptx::bulk_load(ptx::smem_u32(s + 32), g, 128, full);
    } else if (thread() >= 32) {
      ptx::mbar_wait(full, i % 2);
      (void)*static_cast<volatile float*>(s + thread());
      ptx::mbar_arrive(empty);
    }
  }
}
__global__ void bulk_store_twice(float* g) {
  SMEM_DYN(float, s);
  for (int i = 0; i < 2; ++i) {
    if (thread() == 0) ptx::tma_store_wait_read<0>();
    __syncthreads();
    if (thread() < 4) s[thread()] = static_cast<float>(i);
    ptx::fence_proxy_async();
    __syncthreads();
    if (thread() == 0) {
      ptx::bulk_store(g + 4 * i, ptx::smem_u32(s), 16);
      ptx::tma_store_commit();
    }
  }
  if (thread() == 0) ptx::tma_store_wait<0>();
}
__global__ void flag_released_and_acquired(float* g) {
  auto* flag = reinterpret_cast<uint32_t*>(g + 127);
  if (blockIdx.x == 0) {
    g[thread()] = 1;
    __syncthreads();
    if (thread() == 0) ptx::st_release(flag, 1u);
  } else {
    if (thread() == 0)
      while (ptx::ld_acquire(flag) != 1) {
      }
    __syncthreads();
    g[64 + thread()] = g[thread() ^ 1];
  }
}
__global__ void flag_handed_on(float* g) {  // block 0 to 1 to 2
  auto* flag = reinterpret_cast<uint32_t*>(g + 127);
  if (thread() > 0) return;
  if (blockIdx.x > 0)
    while (ptx::ld_acquire(flag) != blockIdx.x) {
    }
  g[0] = blockIdx.x == 0 ? 1 : g[0] + 1;
  ptx::st_release(flag, blockIdx.x + 1);
}
__global__ void last_block_with_fence(float* g) {
  auto* count = reinterpret_cast<uint32_t*>(g + 127);
  SMEM_ARRAY(bool, last, 1);
  if (thread() < 8) g[blockIdx.x * 8 + static_cast<unsigned>(thread())] = 1;
  __syncthreads();
  if (thread() == 0) {
    __threadfence();
    last[0] = atomicAdd(count, 1u) == gridDim.x - 2;
    __threadfence();
  }
  __syncthreads();
  if (last[0] && thread() < 32) g[64 + thread()] = g[thread()];
}
__global__ void last_block_acquires(float* g) {
  auto* count = reinterpret_cast<uint32_t*>(g + 127);
  SMEM_ARRAY(bool, last, 1);
  if (thread() < 8) g[blockIdx.x * 8 + static_cast<unsigned>(thread())] = 1;
  __syncthreads();
  if (thread() == 0) last[0] = ptx::atom_acq_rel_add(count, 1u) == gridDim.x - 2;
  __syncthreads();
  if (last[0] && thread() < 32) g[64 + thread()] = g[thread()];
}
// The first warpgroup releases registers when the others mostly wait for them.
__global__ void registers_handed_over(float* g) {
  if (thread() >= 128) {
    ptx::bar_arrive(1, 384);
    ptx::setmaxnreg_inc<192>();
  } else {
    ptx::bar_sync(1, 384);
    for (int i = 0; i < 100; ++i) __syncwarp();
    ptx::setmaxnreg_dec<120>();
  }
  if (thread() < kFloats) g[thread()] = 1;
}
__global__ void cluster_neighbours(float* g) {
  g[ptx::cluster_rank() * 64 + static_cast<unsigned>(thread())] = 1;
  ptx::cluster_sync();
  (void)*static_cast<volatile float*>(g + (ptx::cluster_rank() ^ 1) * 64 + static_cast<unsigned>(thread()));
  ptx::cluster_sync();
}

}  // namespace

TEST(correct_kernels) {
  expect_silence("tree sum", tree_sum);
  expect_silence("warp exchange", warp_exchange);
  expect_silence("named barriers", named_barriers);
  expect_silence("cp.async ring", cp_async_ring);
  expect_silence("mbarrier ring", mbarrier_ring);
  expect_silence("bulk store twice", bulk_store_twice);
  expect_silence("registers handed over", registers_handed_over, {.threads = 384});
  expect_silence("flag released and acquired", flag_released_and_acquired, {.blocks = 2, .threads = 32});
  expect_silence("flag handed on", flag_handed_on, {.blocks = 3});
  expect_silence("last block with fence", last_block_with_fence, {.blocks = 4});
  expect_silence("last block acquires", last_block_acquires, {.blocks = 4});
  expect_silence("cluster neighbours", cluster_neighbours, {.blocks = 2, .cluster = 2});
}

// ---- what a test can ask of the race build
namespace {

__global__ void writes_in_part(float* g, int first, int count) {
  if (thread() >= first && thread() < first + count) g[thread()] = 1;
}

constexpr int kPatterns = 6;
__global__ void loads_with_conflicts(float* g, int pattern) {
  SMEM_DYN(float, s);
  for (int i = thread(); i < 32 * 32; i += 32) s[i] = 0;
  __syncwarp();
  float sum = 0;
  uint32_t r[4] = {};
  const auto row = [&](int swizzled) {  // rows of 128 bytes, the chunk changes place with the row or does not
    return ptx::smem_u32(s + thread() % 8 * 32 + (thread() / 8 ^ (swizzled * thread() % 8)) * 4);
  };
  switch (pattern) {
    case 0:
      sum = s[thread()];
      break;
    case 1:
      sum = s[thread() * 2];
      break;
    case 2:
      sum = s[thread() * 32];
      break;
    case 3: {
      const float4 v = reinterpret_cast<const float4*>(s)[thread()];
      sum = v.x + v.y * v.z + v.w;
      break;
    }
    case 4:
      ptx::ldmatrix_x4(r, row(0));
      break;
    default:
      ptx::ldmatrix_x4(r, row(1));
      break;
  }
  g[thread()] = sum + static_cast<float>(r[0]);
}

}  // namespace

TEST(bank_conflicts_are_counted) {
  if (!emu::sees_memory_accesses()) return;
  constexpr uint64_t kMost[kPatterns] = {1, 2, 32, 4, 32, 4}, kIdeal[kPatterns] = {1, 1, 1, 4, 4, 4};
  for (int pattern = 0; pattern < kPatterns; ++pattern) {
    const Context c("pattern " + std::to_string(pattern));
    DeviceArray<float> g(32);
    emu::count_bank_conflicts(true);
    LAUNCH(loads_with_conflicts, 1, 32, 4096, nullptr, g.data(), pattern);
    cuda_ok(cudaGetLastError());
    uint64_t wavefronts = 0, ideal = 0;  // of the loads: the stores of zeros come first, 32 without a conflict
    for (const emu::BankCount& count : emu::bank_conflicts()) wavefronts += count.wavefronts, ideal += count.ideal;
    emu::count_bank_conflicts(false);
    CHECK(wavefronts == 32 + kMost[pattern]);
    CHECK(ideal == 32 + kIdeal[pattern]);
  }
}

TEST(what_is_written_once_is_known) {
  if (!emu::sees_memory_accesses()) return;
  const auto once = [](int first, int count, int launches) {
    DeviceArray<float> g(64);
    emu::expect_written_once(g.data(), 64 * sizeof(float));
    for (int i = 0; i < launches; ++i) LAUNCH(writes_in_part, 1, 64, 0, nullptr, g.data(), first, count);
    return emu::check_written_once(g.data());
  };
  CHECK(once(0, 64, 1));
  CHECK(!once(0, 63, 1));
  CHECK(!once(1, 63, 1));
  CHECK(!once(0, 64, 2));
  CHECK(!once(0, 64, 0));
}

}  // namespace moe::test::zoo
