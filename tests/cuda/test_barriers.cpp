// Barriers and order in cuda/ptx against the manual: mbarriers, clusters, multicast, acquire and release, registers.
// Results go through a buffer, so that the same source runs on a GPU.
#include <cstring>

#include "device.h"
#include "instructions.h"
#include "launch.cuh"

namespace moe::cuda {
namespace {

using test::DeviceArray;

void finish() {
  test::cuda_ok(cudaDeviceSynchronize());
  test::cuda_ok(cudaGetLastError());
}

// ---- mbarrier. One thread, so that every state is certain.
__global__ void mbarrier_kernel(int* out, const int* in) {
#if MOE_TEST_SM90
  SMEM_DYN(int, shared);
  SMEM_ARRAY(uint64_t, barrier, 2);
  const uint32_t mbar = ptx::smem_u32(&barrier[0]);
  const auto ended = [&](uint32_t parity) { *out++ = ptx::mbar_try_wait(mbar, parity); };
  ptx::mbar_init(mbar, 2);
  ptx::fence_mbar_init();
  ended(1), ended(0);  // fresh: the phase before the first counts as ended
  ptx::mbar_arrive(mbar);
  ended(0);  // one of two arrivals
  ptx::mbar_arrive(mbar);
  ended(0), ended(1);  // phase 0 is over, phase 1 is not
  // Bytes keep a phase open though all have arrived.
  ptx::mbar_arrive_expect_tx(mbar, 64);
  ptx::mbar_arrive(mbar);
  ended(1);
  ptx::bulk_load(ptx::smem_u32(shared), in, 64, mbar);
  ptx::mbar_wait(mbar, 1);
  *out++ = shared[15];
  ended(1), ended(0);
  // Bytes may be announced without an arrival, and an arrival may come when the bytes are there.
  ptx::mbar_expect_tx(mbar, 32);
  ptx::bulk_load(ptx::smem_u32(shared + 16), in + 16, 32, mbar);
  ptx::mbar_arrive(mbar);
  ended(0);
  ptx::mbar_arrive(mbar);
  ptx::mbar_wait(mbar, 0);
  *out++ = shared[23];
  // The eight bytes are free after inval.
  ptx::mbar_inval(mbar);
  barrier[0] = 5;
  *out++ = static_cast<int>(barrier[0]);
  ptx::mbar_init(ptx::smem_u32(&barrier[1]), 1);
  ptx::mbar_arrive(ptx::smem_u32(&barrier[1]));
  *out++ = ptx::mbar_try_wait(ptx::smem_u32(&barrier[1]), 0);
#endif
}

// Many threads, many phases: each phase sees all that was written before its arrivals.
__global__ void phases_kernel(int* out) {
#if MOE_TEST_SM90
  SMEM_ARRAY(int, values, 64);
  SMEM_ARRAY(uint64_t, barrier, 2);
  const int t = static_cast<int>(threadIdx.x);
  const uint32_t written = ptx::smem_u32(&barrier[0]), read = ptx::smem_u32(&barrier[1]);
  if (t == 0) {
    ptx::mbar_init(written, 64);
    ptx::mbar_init(read, 64);
    ptx::fence_mbar_init();
  }
  __syncthreads();
  int sum = 0;
  for (uint32_t i = 0; i < 5; ++i) {
    ptx::mbar_wait(read, i % 2 ^ 1);
    values[t] = t + static_cast<int>(i);
    ptx::mbar_arrive(written);
    ptx::mbar_wait(written, i % 2);
    sum += values[63 - t];
    ptx::mbar_arrive(read);
  }
  out[t] = sum;
#endif
}

// ---- named barriers and the election
__global__ void named_barrier_kernel(int* out) {
#if MOE_TEST_SM90
  SMEM_ARRAY(int, values, 32);
  const int t = static_cast<int>(threadIdx.x);
  if (t < 32) {
    values[t] = 7 * t;
    ptx::bar_arrive(3, 64);
  } else {
    ptx::bar_sync(3, 64);
    out[t - 32] = values[63 - t];
  }
  const int elected = ptx::elect_one();
  const int count = __popc(__ballot_sync(~0u, elected));
  if (t % 32 == 0) out[32 + t / 32] = count;
#endif
}

// ---- clusters of 2
__global__ void cluster_kernel(int* out, const __grid_constant__ CUtensorMap map) {
#if MOE_TEST_SM90
  SMEM_DYN(uint16_t, tile);
  SMEM_ARRAY(uint64_t, barrier, 2);
  const int t = static_cast<int>(threadIdx.x);
  const uint32_t rank = ptx::cluster_rank(), loaded = ptx::smem_u32(&barrier[0]), heard = ptx::smem_u32(&barrier[1]);
  if (t == 0) {
    ptx::mbar_init(loaded, 1);
    ptx::mbar_init(heard, 32);
    ptx::fence_mbar_init();
  }
  ptx::cluster_sync();
  // Each block loads one half of the tile into both.
  if (t == 0) {
    ptx::mbar_arrive_expect_tx(loaded, 512);
    ptx::tma_load_2d_multicast(ptx::smem_u32(tile) + rank * 256, &map, loaded, 3, 0, static_cast<int>(rank) * 8);
  }
  ptx::mbar_wait(loaded, 0);
  int sum = 0;
  for (int i = t; i < 256; i += 32) sum += tile[i] * (i + 1);
  sum = __reduce_add_sync(~0u, sum);
  // 32 arrivals from the other block.
  ptx::mbar_arrive_cluster(ptx::mapa(heard, rank ^ 1));
  ptx::mbar_wait(heard, 0);
  ptx::cluster_arrive();  // nobody leaves while it is written to
  ptx::cluster_wait();
  if (t == 0) {
    out[4 * blockIdx.x] = static_cast<int>(rank);
    out[4 * blockIdx.x + 1] = static_cast<int>(ptx::cluster_size());
    out[4 * blockIdx.x + 2] = sum;
    out[4 * blockIdx.x + 3] = ptx::mapa(heard, rank) != ptx::mapa(heard, rank ^ 1);
  }
#endif
}

// ---- order between blocks. The grid is small enough to run at once.
__global__ void order_kernel(int* data, uint32_t* flags, int* out) {
  const int t = static_cast<int>(threadIdx.x), b = static_cast<int>(blockIdx.x);
  data[32 * b + t] = 100 * b + t;
  __syncthreads();
  // The last block to come reads what all wrote.
  SMEM_ARRAY(uint32_t, before, 1);
  if (t == 0) before[0] = ptx::atom_acq_rel_add(&flags[0], 1u);
  __syncthreads();
  if (before[0] == gridDim.x - 1) {
    for (unsigned i = 0; i < gridDim.x; ++i)
      out[32 * i + static_cast<unsigned>(t)] = data[32 * i + 31 - static_cast<unsigned>(t)];
  }
  // Every block but the first waits for its neighbour.
  if (t > 0) return;
  if (b > 0)
    while (ptx::ld_acquire(&flags[b]) == 0) {
    }
  const int sum = b == 0 ? 1 : data[4000 + b - 1] + b + 1;
  data[4000 + b] = sum;
  ptx::st_release(&flags[b + 1], 1u);
  ptx::red_release_add(&flags[100], static_cast<uint32_t>(sum));
}

// ---- registers: only that nothing else changes
__global__ void __launch_bounds__(128, 4) registers_kernel(int* out) {
#if MOE_TEST_SM90A
  const int t = static_cast<int>(threadIdx.x);
  int x = 3 * t;
  ptx::setmaxnreg_dec<40>();
  x += 1;
  __syncthreads();
  ptx::setmaxnreg_inc<64>();
  out[t] = x + 1;
#endif
}

__global__ void tf32_kernel(uint32_t* out, const float* in) { out[threadIdx.x] = ptx::to_tf32(in[threadIdx.x]); }

}  // namespace

TEST(mbarrier_phases) {
  if (!test::has_sm90()) return;
  std::vector<int> in(32);
  for (int i = 0; i < 32; ++i) in[static_cast<size_t>(i)] = 10 * i;
  const DeviceArray<int> d_in(in);
  DeviceArray<int> out(13);
  LAUNCH(mbarrier_kernel, 1, 1, 128, nullptr, out.data(), d_in.data());
  finish();
  CHECK((out.host() == std::vector<int>{1, 0, 0, 1, 0, 0, 150, 1, 0, 0, 230, 5, 1}));
  DeviceArray<int> sums(64);
  LAUNCH(phases_kernel, 1, 64, 0, nullptr, sums.data());
  finish();
  const auto got = sums.host();
  for (int t = 0; t < 64; ++t) CHECK(got[static_cast<size_t>(t)] == 5 * (63 - t) + 10);
}

TEST(named_barriers_and_election) {
  if (!test::has_sm90()) return;
  DeviceArray<int> out(34);
  LAUNCH(named_barrier_kernel, 1, 64, 0, nullptr, out.data());
  finish();
  const auto got = out.host();
  for (int t = 0; t < 32; ++t) CHECK(got[static_cast<size_t>(t)] == 7 * (31 - t));
  CHECK(got[32] == 1 && got[33] == 1);
}

TEST(clusters_and_multicast) {
  if (!test::has_sm90()) return;
  std::vector<uint16_t> tensor(256);
  int expected = 0;
  for (int i = 0; i < 256; ++i) {
    tensor[static_cast<size_t>(i)] = static_cast<uint16_t>(i * 5 % 97);
    expected += tensor[static_cast<size_t>(i)] * (i + 1);
  }
  DeviceArray<uint16_t> data(tensor);
  const CUtensorMap map = test::tensor_map(data.data(), {16, 16, 1}, 16, {16, 8, 0}, CU_TENSOR_MAP_SWIZZLE_NONE);
  DeviceArray<int> out(16);
  const auto kernel = cluster_kernel;
  LAUNCH_EX(kernel, (ptx::Launch{.grid = 4, .block = 32, .smem = 512, .cluster = 2}), out.data(), map);
  finish();
  const auto got = out.host();
  for (int b = 0; b < 4; ++b) {
    const int* at = &got[static_cast<size_t>(4 * b)];
    CHECK(at[0] == b % 2 && at[1] == 2 && at[2] == expected && at[3] == 1);
  }
}

TEST(acquire_and_release) {
  constexpr int kBlocks = 6;
  DeviceArray<int> data(4000 + kBlocks), out(32 * kBlocks);
  DeviceArray<uint32_t> flags(std::vector<uint32_t>(101, 0));
  LAUNCH(order_kernel, kBlocks, 32, 0, nullptr, data.data(), flags.data(), out.data());
  finish();
  const auto got = out.host();
  for (int i = 0; i < 32 * kBlocks; ++i) CHECK(got[static_cast<size_t>(i)] == i / 32 * 100 + 31 - i % 32);
  CHECK(data.host()[4000 + kBlocks - 1] == kBlocks * (kBlocks + 1) / 2);
  CHECK(flags.host()[100] == 1 + 3 + 6 + 10 + 15 + 21);
}

TEST(registers_move) {
  if (!test::has_sm90()) return;
  DeviceArray<int> out(128);
  LAUNCH(registers_kernel, 1, 128, 0, nullptr, out.data());
  finish();
  const auto got = out.host();
  for (int t = 0; t < 128; ++t) CHECK(got[static_cast<size_t>(t)] == 3 * t + 2);
}

// What a call returned is not found again after the next launch.
TEST(an_error_is_told_once) {
  test::DeviceContext context;
  const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(tf32_kernel),
                                                 cudaFuncAttributeMaxDynamicSharedMemorySize, 1 << 24);
  CHECK(check(error, "a call", context.get()) == Status::kCudaError);
  CHECK(!context.reported().empty());
  CHECK(cudaGetLastError() == cudaSuccess);
}

// Half a unit goes away from zero; the 13 low bits are ignored by mma.
TEST(tf32_rounding) {
  const std::vector<float> in = {1, 1 + 0x1p-11f, 1 + 0x1p-12f, -1 - 0x1p-11f, 1 + 3 * 0x1p-11f,
                                 0, INFINITY,     0x1p-130f};
  const std::vector<float> expected = {1, 1 + 0x1p-10f, 1, -1 - 0x1p-10f, 1 + 2 * 0x1p-10f, 0, INFINITY, 0x1p-130f};
  const DeviceArray<float> d_in(in);
  DeviceArray<uint32_t> out(in.size());
  LAUNCH(tf32_kernel, 1, static_cast<unsigned>(in.size()), 0, nullptr, out.data(), d_in.data());
  finish();
  const auto got = out.host();
  for (size_t i = 0; i < in.size(); ++i) {
    const uint32_t bits = got[i] & 0xffffe000u;
    float value;
    static_assert(sizeof value == sizeof bits);
    std::memcpy(&value, &bits, sizeof value);
    CHECK(value == expected[i]);
  }
}

}  // namespace moe::cuda
