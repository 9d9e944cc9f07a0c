// The matrix instructions of cuda/ptx against their documented layouts, written from the manual's thread-value maps and
// not from the emulator; test_copies.cpp and test_barriers.cpp have the other instructions. Results go through a
// buffer, so that the same source runs on a GPU.
#include <cmath>
#include <cstring>

#include "device.h"
#include "instructions.h"
#include "ptx/ptx.cuh"

namespace moe::cuda {
namespace {

using test::DeviceArray;

// Small integers: exact in bf16, fp16 and tf32, and so are their sums in fp32.
__device__ __host__ float value(int i) { return static_cast<float>((i * 7919 + 13) % 61 - 30); }
__device__ uint16_t bits16(float x, bool half) {
  return half ? __half_as_ushort(__float2half(x)) : static_cast<uint16_t>(__float_as_uint(x) >> 16);
}

__global__ void mma_kernel(float* d_out, int kind) {  // 0: bf16, 1: fp16, 2: tf32
  const int t = static_cast<int>(threadIdx.x);
  uint32_t a[4] = {}, b[2] = {};
  float d[4] = {1, 1, 1, 1};
  if (kind < 2) {
    for (int v = 0; v < 8; ++v) {
      const int i = t % 4 * 32 + t / 4 + (v & 1) * 16 + (v >> 1 & 1) * 8 + (v >> 2) * 128, m = i % 16, k = i / 16;
      a[v / 2] |= uint32_t{bits16(value(m * 16 + k), kind == 1)} << 16 * (v & 1);
    }
    for (int v = 0; v < 4; ++v) {
      const int i = t % 4 * 16 + t / 4 + (v & 1) * 8 + (v >> 1) * 64, n = i % 8, k = i / 8;
      b[v / 2] |= uint32_t{bits16(value(1000 + n * 16 + k), kind == 1)} << 16 * (v & 1);
    }
    if (kind == 0)
      ptx::mma_bf16_16816(d, a, b[0], b[1]);
    else
      ptx::mma_f16_16816(d, a, b[0], b[1]);
  } else {
    for (int v = 0; v < 4; ++v) {
      const int i = t % 4 * 16 + t / 4 + (v & 1) * 8 + (v >> 1) * 64;
      a[v] = ptx::to_tf32(value(i % 16 * 16 + i / 16));
    }
    for (int v = 0; v < 2; ++v) {
      const int i = t % 4 * 8 + t / 4 + v * 32;
      b[v] = ptx::to_tf32(value(1000 + i % 8 * 16 + i / 8));
    }
    ptx::mma_tf32_1688(d, a, b[0], b[1]);
  }
  for (int v = 0; v < 4; ++v) d_out[t % 4 * 32 + t / 4 + (v & 1) * 16 + (v >> 1) * 8] = d[v];  // column-major 16x8
}

// Loads 4 matrices, and stores them elsewhere (sm_90), plain and transposed.
__global__ void matrices_kernel(uint32_t* loaded, uint16_t* stored, int transposed) {
  SMEM_ARRAY(uint16_t, from, 256);
  const int t = static_cast<int>(threadIdx.x);
  for (int i = t; i < 256; i += 32) from[i] = static_cast<uint16_t>(i);
  __syncwarp();
  uint32_t r[4];
  if (transposed)
    ptx::ldmatrix_x4_trans(r, ptx::smem_u32(&from[t * 8]));
  else
    ptx::ldmatrix_x4(r, ptx::smem_u32(&from[t * 8]));
  for (int i = 0; i < 4; ++i) loaded[t * 4 + i] = r[i];
#if MOE_TEST_SM90
  SMEM_ARRAY(uint16_t, to, 256);
  if (transposed)
    ptx::stmatrix_x4_trans(ptx::smem_u32(&to[t * 8]), r);
  else
    ptx::stmatrix_x4(ptx::smem_u32(&to[t * 8]), r);
  __syncwarp();
  for (int i = t; i < 256; i += 32) stored[i] = to[i];
#endif
}

// Where element (mn, k) lies before the swizzle: the canonical layouts of a wgmma descriptor, 16-bit elements.
// width: chunks of 16 bytes in a row of the pattern, 8 (128B), 4, 2 or 1 (no swizzle).
[[maybe_unused]] __device__ uint32_t canonical(bool mn_major, int width, int mn, int k, uint32_t leading,
                                               uint32_t stride) {
  const int c = (mn_major ? mn : k) / 8, i = mn_major ? k : mn, e = (mn_major ? mn : k) % 8;
  const uint32_t u = static_cast<uint32_t>(e * 2 + i % 8 * 16 * width);
  if (!mn_major)
    return u + static_cast<uint32_t>(i / 8) * stride + static_cast<uint32_t>(c) * (width > 1 ? 16 : leading);
  if (width > 1)
    return u + static_cast<uint32_t>(c % width * 16) + static_cast<uint32_t>(c / width) * leading +
           static_cast<uint32_t>(i / 8) * stride;
  return u + static_cast<uint32_t>(c) * stride + static_cast<uint32_t>(i / 8) * leading;
}

template <int N, typename T, int kTransA, int kTransB, bool kRegisterA>
__global__ void wgmma_kernel(float* d_out, int width) {
#if MOE_TEST_SM90A
  SMEM_DYN(unsigned char, smem);
  const int t = static_cast<int>(threadIdx.x);
  constexpr bool kHalf = std::is_same_v<T, __half>;
  // Strides that suit both operands: nothing overlaps in 64 KB.
  const bool mn = kTransA || kTransB;
  const uint32_t leading = width == 1 ? 8192 : mn ? 2048u * static_cast<uint32_t>(width) : 16;
  const uint32_t stride = width == 1 ? 128 : 128u * static_cast<uint32_t>(width);
  const uint32_t base = ptx::smem_u32(smem), mask = static_cast<uint32_t>(width) - 1;
  const auto put = [&](uint32_t at, bool mn_major, int i, int k, float x) {
    const uint32_t a = base + at + canonical(mn_major, width, i, k, leading, stride);
    *reinterpret_cast<uint16_t*>(smem + ((a ^ ((a >> 7 & mask) << 4)) - base)) = bits16(x, kHalf);
  };
  for (int i = t; i < 64 * 16; i += 128) put(0, kTransA, i / 16, i % 16, value(i));
  for (int i = t; i < N * 16; i += 128) put(65536, kTransB, i / 16, i % 16, value(5000 + i));
  ptx::fence_proxy_async();
  __syncthreads();
  float d[N / 2];
  for (int i = 0; i < N / 2; ++i) d[i] = 1;
  const auto descriptor = [&](uint32_t a) {
    const uint64_t kind = width == 8 ? 1 : width == 4 ? 2 : width == 2 ? 3 : 0;
    return uint64_t{(a & 0x3ffff) >> 4} | uint64_t{leading >> 4} << 16 | uint64_t{stride >> 4} << 32 | kind << 62;
  };
  uint32_t a[4] = {};
  for (int v = 0; v < 8; ++v) {
    const int row = t / 32 * 16 + t % 32 / 4 + (v >> 1 & 1) * 8, k = t % 4 * 2 + (v & 1) + (v >> 2) * 8;
    a[v / 2] |= uint32_t{bits16(value(row * 16 + k), kHalf)} << 16 * (v & 1);
  }
  ptx::wgmma_fence();
  if constexpr (kRegisterA)
    ptx::wgmma_register_a<N, T, kTransB>(d, a, descriptor(base + 65536), 1);
  else
    ptx::wgmma<N, T, kTransA, kTransB>(d, descriptor(base), descriptor(base + 65536), 1);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  for (int v = 0; v < N / 2; ++v)  // column-major 64xN
    d_out[t % 4 * 128 + t / 4 % 8 + t / 32 * 16 + (v & 1) * 64 + (v >> 1 & 1) * 8 + (v >> 2) * 512] = d[v];
#endif
}

template <int N, typename T, int kTransA, int kTransB, bool kRegisterA>
void check_wgmma() {
  const auto kernel = wgmma_kernel<N, T, kTransA, kTransB, kRegisterA>;
  test::cuda_ok(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     160 * 1024));
  for (const int width : {1, 2, 4, 8}) {
    DeviceArray<float> d(64 * N);
    LAUNCH(kernel, 1, 128, 160 * 1024, nullptr, d.data(), width);
    test::cuda_ok(cudaDeviceSynchronize());
    test::cuda_ok(cudaGetLastError());
    const auto got = d.host();
    bool ok = true;
    for (int m = 0; m < 64; ++m)
      for (int n = 0; n < N; ++n) {
        float sum = 1;
        for (int k = 0; k < 16; ++k) sum += value(m * 16 + k) * value(5000 + n * 16 + k);
        ok = ok && got[static_cast<size_t>(n * 64 + m)] == sum;
      }
    CHECK(ok);
  }
}

// Every thread comes to the second barrier as soon as it is through the first, however late the others wait for that.
__global__ void cluster_kernel(int* seen, int blocks) {
#if MOE_TEST_SM90
  for (int phase = 0; phase < 3; ++phase) {
    if (threadIdx.x == 0) seen[phase * blocks + blockIdx.x] = static_cast<int>(ptx::cluster_rank()) + phase;
    ptx::cluster_sync();
    for (int b = 0; b < blocks; ++b) {
      if (seen[phase * blocks + b] != b + phase) seen[3 * blocks] = 1;
    }
  }
#endif
}

__global__ void math_kernel(float* y, const float* x, int kind) {
  const float a = x[threadIdx.x], b = x[threadIdx.x ^ 1];
  y[threadIdx.x] = kind == 0   ? ptx::exp2_approx(a)
                   : kind == 1 ? ptx::reciprocal_approx(a)
                   : kind == 2 ? ptx::sqrt_approx(a)
                               : ptx::max_or_nan(a, b);
}
std::vector<float> compute(const std::vector<float>& x, int kind) {
  DeviceArray<float> in(x), out(x.size());
  LAUNCH(math_kernel, 1, dim3(static_cast<unsigned>(x.size())), 0, nullptr, out.data(), in.data(), kind);
  test::cuda_ok(cudaDeviceSynchronize());
  test::cuda_ok(cudaGetLastError());
  return out.host();
}

}  // namespace

TEST(mma) {
  for (const int kind : {0, 1, 2}) {
    DeviceArray<float> d(128);
    LAUNCH(mma_kernel, 1, 32, 0, nullptr, d.data(), kind);
    test::cuda_ok(cudaDeviceSynchronize());
    test::cuda_ok(cudaGetLastError());
    const auto got = d.host();
    for (int m = 0; m < 16; ++m)
      for (int n = 0; n < 8; ++n) {
        float sum = 1;
        for (int k = 0; k < (kind == 2 ? 8 : 16); ++k) sum += value(m * 16 + k) * value(1000 + n * 16 + k);
        CHECK(got[static_cast<size_t>(n * 16 + m)] == sum);
      }
  }
}

TEST(exp2) {
  std::vector<float> x;
  for (int i = 0; i < 60; ++i) x.push_back(-125.9f + 4.1f * static_cast<float>(i));
  x.insert(x.end(), {-127.5f, -INFINITY, INFINITY, NAN});
  const auto got = compute(x, 0);
  for (size_t i = 0; i < 60; ++i) {
    const double expected = std::exp2(static_cast<double>(x[i]));
    CHECK(std::abs(got[i] - expected) <= 0x1p-22 * expected);
  }
  CHECK(got[60] == 0 && got[61] == 0 && got[62] == INFINITY && std::isnan(got[63]));
}

TEST(reciprocal_and_root) {
  constexpr float kSubnormal = 0x1.8p-127f;  // whose reciprocal is finite, were it not a zero
  std::vector<float> x;
  for (int i = 0; i < 56; ++i) x.push_back(std::ldexp(1 + static_cast<float>(i) / 57, 4 * i - 112));
  x.insert(x.end(), {0.0f, -0.0f, kSubnormal, -kSubnormal, INFINITY, NAN, 0x1.8p127f, 1.0f});
  const auto reciprocals = compute(x, 1), roots = compute(x, 2);
  for (size_t i = 0; i < 56; ++i) {
    const double reciprocal = 1 / static_cast<double>(x[i]), root = std::sqrt(static_cast<double>(x[i]));
    CHECK(std::abs(reciprocals[i] - reciprocal) <= 0x1p-23 * reciprocal);
    CHECK(std::abs(roots[i] - root) <= 0x1p-22 * root);
  }
  CHECK(reciprocals[56] == INFINITY && reciprocals[57] == -INFINITY && reciprocals[58] == INFINITY);
  CHECK(reciprocals[59] == -INFINITY && reciprocals[60] == 0 && std::isnan(reciprocals[61]) && reciprocals[62] == 0);
  CHECK(roots[56] == 0 && roots[57] == 0 && roots[58] == 0 && roots[59] == 0 && roots[60] == INFINITY);
  CHECK(std::isnan(roots[61]));
}

TEST(max_or_nan) {
  const auto got = compute({1, 2, NAN, 3, -INFINITY, -1, NAN, NAN}, 3);
  CHECK(got[0] == 2 && got[1] == 2 && std::isnan(got[2]) && std::isnan(got[3]) && got[4] == -1 && std::isnan(got[6]));
}

TEST(ldmatrix_stmatrix) {
  for (const int transposed : {0, 1}) {
    DeviceArray<uint32_t> loaded(128);
    DeviceArray<uint16_t> stored(256);
    LAUNCH(matrices_kernel, 1, 32, 0, nullptr, loaded.data(), stored.data(), transposed);
    test::cuda_ok(cudaDeviceSynchronize());
    test::cuda_ok(cudaGetLastError());
    const auto got = loaded.host();
    for (int t = 0; t < 32; ++t)
      for (int i = 0; i < 4; ++i) {
        const int first = i * 64 + (transposed ? t % 4 * 16 + t / 4 : t / 4 * 8 + t % 4 * 2);
        const int second = first + (transposed ? 8 : 1);
        CHECK(got[static_cast<size_t>(t * 4 + i)] == static_cast<uint32_t>(first | second << 16));
      }
    if (!test::has_sm90()) continue;
    const auto back = stored.host();
    for (int i = 0; i < 256; ++i) CHECK(back[static_cast<size_t>(i)] == i);
  }
}

TEST(cluster_barrier) {
  if (!test::has_sm90()) return;
  constexpr int kBlocks = 2;
  DeviceArray<int> seen(3 * kBlocks + 1);
  LAUNCH_EX(cluster_kernel, (ptx::Launch{.grid = dim3(kBlocks), .block = dim3(64), .cluster = kBlocks}), seen.data(),
            kBlocks);
  test::cuda_ok(cudaDeviceSynchronize());
  test::cuda_ok(cudaGetLastError());
  const auto got = seen.host();
  for (int i = 0; i < 3 * kBlocks; ++i) CHECK(got[static_cast<size_t>(i)] == i % kBlocks + i / kBlocks);
  CHECK(got[3 * kBlocks] == -1);
}

TEST(wgmma) {
  if (!test::has_sm90()) return;
  check_wgmma<8, __nv_bfloat16, 0, 0, false>();
  check_wgmma<64, __half, 0, 1, false>();
  check_wgmma<128, __nv_bfloat16, 1, 0, false>();
  check_wgmma<256, __nv_bfloat16, 1, 1, false>();
  check_wgmma<24, __half, 0, 0, true>();
  check_wgmma<128, __nv_bfloat16, 0, 1, true>();
}

}  // namespace moe::cuda
