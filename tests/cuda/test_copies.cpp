// The asynchronous copies of cuda/ptx against the manual: cp.async, bulk copies, TMA by tensor map. Results go through
// a buffer, so that the same source runs on a GPU.
#include <algorithm>

#include "device.h"
#include "instructions.h"
#include "ptx/ptx.cuh"

namespace moe::cuda {
namespace {

using test::DeviceArray;

// ---- cp.async: how many bytes come from memory, and which wait sees them

template <int kBytes>
__global__ void cp_async_kernel(unsigned char* out, const unsigned char* in, int src_bytes) {
  SMEM_ARRAY(uint4, shared, 32);
  const int t = static_cast<int>(threadIdx.x);
  unsigned char* mine = reinterpret_cast<unsigned char*>(&shared[t]);
  for (int i = 0; i < 16; ++i) mine[i] = 0x77;
  ptx::cp_async<kBytes>(ptx::smem_u32(mine), src_bytes == 0 ? in : in + 16 * t, src_bytes);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  for (int i = 0; i < 16; ++i) out[16 * t + i] = mine[i];
}

template <int kBytes>
void check_cp_async() {
  std::vector<unsigned char> in(512);
  for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<unsigned char>(i * 7 + 1);
  const DeviceArray<unsigned char> d_in(in);
  for (int src_bytes = 0; src_bytes <= kBytes; ++src_bytes) {
    DeviceArray<unsigned char> out(512);
    LAUNCH(cp_async_kernel<kBytes>, 1, 32, 0, nullptr, out.data(), d_in.data(), src_bytes);
    test::cuda_ok(cudaDeviceSynchronize());
    test::cuda_ok(cudaGetLastError());
    const auto got = out.host();
    bool ok = true;
    for (int t = 0; t < 32; ++t)
      for (int i = 0; i < 16; ++i) {
        const size_t at = static_cast<size_t>(16 * t + i);
        ok = ok && got[at] == (i < src_bytes ? in[at] : i < kBytes ? 0 : 0x77);
      }
    CHECK(ok);
  }
}

// Two groups in flight; at most one may be left by the first wait.
__global__ void cp_async_groups_kernel(int* out, const int* in) {
  SMEM_ARRAY(int, shared, 64);
  const int t = static_cast<int>(threadIdx.x);
  for (int group = 0; group < 2; ++group) {
    ptx::cp_async<4>(ptx::smem_u32(&shared[group * 32 + t]), in + group * 32 + t);
    ptx::cp_async_commit();
  }
  ptx::cp_async_commit();  // an empty group counts too
  ptx::cp_async_wait<2>();
  out[t] = shared[t];
  ptx::cp_async_wait<0>();
  out[32 + t] = shared[32 + t];
}

// .noinc: the arrival is one of those that mbarrier.init announced, here two for each thread.
__global__ void cp_async_arrive_kernel(int* out, const int* in) {
#if MOE_TEST_SM90
  SMEM_ARRAY(int, shared, 64);
  SMEM_ARRAY(uint64_t, barrier, 1);
  const int t = static_cast<int>(threadIdx.x);
  const uint32_t mbar = ptx::smem_u32(barrier);
  if (t == 0) ptx::mbar_init(mbar, 64);
  __syncthreads();
  for (int part = 0; part < 2; ++part) {
    ptx::cp_async<4>(ptx::smem_u32(&shared[part * 32 + t]), in + part * 32 + t);
    ptx::cp_async_mbar_arrive_noinc(mbar);
  }
  ptx::mbar_wait(mbar, 0);
  for (int part = 0; part < 2; ++part) out[part * 32 + t] = shared[part * 32 + (31 - t)];  // of another thread
#endif
}

// ---- bulk copies: a round trip in two bulk groups

__global__ void bulk_kernel(int* out, const int* in) {
#if MOE_TEST_SM90
  SMEM_DYN(int, shared);
  SMEM_ARRAY(uint64_t, barrier, 1);
  const int t = static_cast<int>(threadIdx.x);
  const uint32_t mbar = ptx::smem_u32(barrier);
  if (t == 0) {
    ptx::mbar_init(mbar, 1);
    ptx::fence_mbar_init();
    ptx::mbar_arrive_expect_tx(mbar, 512);
    ptx::bulk_load(ptx::smem_u32(shared), in, 384, mbar);
    ptx::bulk_load(ptx::smem_u32(shared + 96), in + 96, 128, mbar);
  }
  __syncthreads();
  ptx::mbar_wait(mbar, 0);
  for (int i = t; i < 128; i += 32) shared[i] += 1;
  ptx::fence_proxy_async();
  __syncthreads();
  if (t > 0) return;
  for (int group = 0; group < 2; ++group) {
    ptx::bulk_store(out + group * 64, ptx::smem_u32(shared + group * 64), 256);
    ptx::tma_store_commit();
  }
  ptx::tma_store_wait_read<1>();
  shared[0] = -1;  // the first group has been read
  ptx::tma_store_wait_read<0>();
  shared[64] = -1;
  ptx::tma_store_wait<0>();
#endif
}

// ---- TMA

// A tensor [4][12][40] of 16-bit elements with rows of 48; boxes of it at every kind of edge.
constexpr int kInner = 40, kPitch = 48, kMiddle = 12, kOuter = 4;
constexpr size_t kElements = size_t{kPitch} * kMiddle * kOuter;
uint16_t element(int x, int y, int z) { return static_cast<uint16_t>(1 + x + kPitch * (y + kMiddle * z)); }

__global__ void tma_load_kernel(uint16_t* out, const __grid_constant__ CUtensorMap map, int rank, int bytes, int x,
                                int y, int z) {
#if MOE_TEST_SM90
  SMEM_DYN(uint16_t, shared);
  SMEM_ARRAY(uint64_t, barrier, 1);
  const int t = static_cast<int>(threadIdx.x);
  const uint32_t mbar = ptx::smem_u32(barrier);
  if (t == 0) {
    ptx::prefetch_tmap(&map);
    ptx::mbar_init(mbar, 1);
    ptx::fence_mbar_init();
    ptx::mbar_arrive_expect_tx(mbar, static_cast<uint32_t>(bytes));  // all of the box, whatever lies outside
    if (rank == 2)
      ptx::tma_load_2d(ptx::smem_u32(shared), &map, mbar, x, y);
    else if (y % 2 != 0)
      ptx::tma_load_3d_once(ptx::smem_u32(shared), &map, mbar, x, y, z);
    else
      ptx::tma_load_3d(ptx::smem_u32(shared), &map, mbar, x, y, z);
  }
  __syncthreads();
  ptx::mbar_wait(mbar, 0);
  for (int i = t; i < bytes / 2; i += 32) out[i] = shared[i];
#endif
}

__global__ void tma_store_kernel(const __grid_constant__ CUtensorMap map, int rank, int bytes, int x, int y, int z) {
#if MOE_TEST_SM90
  SMEM_DYN(uint16_t, shared);
  const int t = static_cast<int>(threadIdx.x);
  for (int i = t; i < bytes / 2; i += 32) shared[i] = static_cast<uint16_t>(20000 + i);
  ptx::fence_proxy_async();
  __syncthreads();
  if (t > 0) return;
  if (rank == 2)
    ptx::tma_store_2d(&map, ptx::smem_u32(shared), x, y);
  else
    ptx::tma_store_3d(&map, ptx::smem_u32(shared), x, y, z);
  ptx::tma_store_commit();
  ptx::tma_store_wait<0>();
#endif
}

struct Box {
  int width, height, depth;  // elements
  CUtensorMapSwizzle swizzle;
  int rank() const { return depth == 0 ? 2 : 3; }
  int bytes() const { return 2 * width * height * std::max(depth, 1); }
  // Byte of an element in shared memory: rows one after the other, then the swizzle of 16-byte chunks.
  int place(int x, int y, int z) const {
    const int a = 2 * (x + width * (y + height * z));
    const int mask = swizzle == CU_TENSOR_MAP_SWIZZLE_128B  ? 7
                     : swizzle == CU_TENSOR_MAP_SWIZZLE_64B ? 3
                     : swizzle == CU_TENSOR_MAP_SWIZZLE_32B ? 1
                                                            : 0;
    return a ^ ((a / 128 & mask) * 16);
  }
};

const Box kBoxes[] = {
    {64, 8, 0, CU_TENSOR_MAP_SWIZZLE_128B}, {32, 16, 0, CU_TENSOR_MAP_SWIZZLE_64B},
    {16, 16, 0, CU_TENSOR_MAP_SWIZZLE_32B}, {24, 5, 0, CU_TENSOR_MAP_SWIZZLE_NONE},
    {64, 4, 2, CU_TENSOR_MAP_SWIZZLE_128B}, {8, 3, 3, CU_TENSOR_MAP_SWIZZLE_NONE},
};
constexpr int kCorners[][3] = {{0, 0, 0}, {8, 3, 1}, {-3, -2, -1}, {33, 9, 3}, {40, 0, 0}, {0, 12, 0}, {-64, 0, 0}};

template <typename Fn>
void for_boxes(uint16_t* data, const Fn& fn) {
  for (const Box& box : kBoxes) {
    const CUtensorMap map =
        test::tensor_map(data, {kInner, kMiddle, kOuter}, kPitch, {box.width, box.height, box.depth}, box.swizzle);
    for (const auto& corner : kCorners) {
      const test::Context c("box of " + std::to_string(box.width) + " at " + std::to_string(corner[0]));
      fn(box, map, corner);
      test::cuda_ok(cudaDeviceSynchronize());
      test::cuda_ok(cudaGetLastError());
    }
  }
}
bool inside(int x, int y, int z) { return x >= 0 && x < kInner && y >= 0 && y < kMiddle && z >= 0 && z < kOuter; }

}  // namespace

TEST(cp_async_fills_with_zeros) {
  check_cp_async<4>();
  check_cp_async<8>();
  check_cp_async<16>();
}

TEST(cp_async_groups) {
  std::vector<int> in(64);
  for (int i = 0; i < 64; ++i) in[static_cast<size_t>(i)] = 100 + i;
  const DeviceArray<int> d_in(in);
  DeviceArray<int> out(64);
  LAUNCH(cp_async_groups_kernel, 1, 32, 0, nullptr, out.data(), d_in.data());
  test::cuda_ok(cudaDeviceSynchronize());
  CHECK(out.host() == in);
  if (!test::has_sm90()) return;
  DeviceArray<int> arrived(64);
  LAUNCH(cp_async_arrive_kernel, 1, 32, 0, nullptr, arrived.data(), d_in.data());
  test::cuda_ok(cudaDeviceSynchronize());
  const auto got = arrived.host();
  for (size_t i = 0; i < 64; ++i) CHECK(got[i] == in[i / 32 * 32 + 31 - i % 32]);
}

TEST(bulk_copies) {
  if (!test::has_sm90()) return;
  std::vector<int> in(128);
  for (int i = 0; i < 128; ++i) in[static_cast<size_t>(i)] = 3 * i;
  const DeviceArray<int> d_in(in);
  DeviceArray<int> out(128);
  LAUNCH(bulk_kernel, 1, 32, 512, nullptr, out.data(), d_in.data());
  test::cuda_ok(cudaDeviceSynchronize());
  const auto got = out.host();
  for (size_t i = 0; i < 128; ++i) CHECK(got[i] == in[i] + 1);
}

TEST(tma_loads) {
  if (!test::has_sm90()) return;
  std::vector<uint16_t> tensor(kElements);
  for (size_t i = 0; i < kElements; ++i) tensor[i] = static_cast<uint16_t>(1 + i);
  DeviceArray<uint16_t> data(tensor);
  for_boxes(data.data(), [&](const Box& box, const CUtensorMap& map, const int (&at)[3]) {
    DeviceArray<uint16_t> out(static_cast<size_t>(box.bytes()) / 2);
    LAUNCH(tma_load_kernel, 1, 32, static_cast<size_t>(box.bytes()), nullptr, out.data(), map, box.rank(), box.bytes(),
           at[0], at[1], at[2]);
    test::cuda_ok(cudaDeviceSynchronize());
    const auto got = out.host();
    bool ok = true;
    for (int z = 0; z < std::max(box.depth, 1); ++z)
      for (int y = 0; y < box.height; ++y)
        for (int x = 0; x < box.width; ++x) {
          const int gx = at[0] + x, gy = at[1] + y, gz = box.rank() == 2 ? 0 : at[2] + z;
          ok = ok && got[static_cast<size_t>(box.place(x, y, z)) / 2] ==
                         (inside(gx, gy, gz) ? element(gx, gy, gz) : uint16_t{0});
        }
    CHECK(ok);
  });
}

TEST(tma_stores) {
  if (!test::has_sm90()) return;
  DeviceArray<uint16_t> data(kElements);
  for_boxes(data.data(), [&](const Box& box, const CUtensorMap& map, const int (&at)[3]) {
    test::cuda_ok(cudaMemset(data.data(), 0xff, kElements * 2));
    LAUNCH(tma_store_kernel, 1, 32, static_cast<size_t>(box.bytes()), nullptr, map, box.rank(), box.bytes(), at[0],
           at[1], at[2]);
    test::cuda_ok(cudaDeviceSynchronize());
    std::vector<uint16_t> expected(kElements, 0xffff);
    for (int z = 0; z < std::max(box.depth, 1); ++z)
      for (int y = 0; y < box.height; ++y)
        for (int x = 0; x < box.width; ++x) {
          const int gx = at[0] + x, gy = at[1] + y, gz = box.rank() == 2 ? 0 : at[2] + z;
          if (inside(gx, gy, gz))
            expected[element(gx, gy, gz) - size_t{1}] = static_cast<uint16_t>(20000 + box.place(x, y, z) / 2);
        }
    CHECK(data.host() == expected);
  });
}

}  // namespace moe::cuda
