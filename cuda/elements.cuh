// Element types on the device: widening, narrowing, and 16-byte pieces of a row.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "launch.cuh"

namespace moe::cuda {

// The type that sums and scores of T are computed in.
template <typename T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }

template <typename T>
__device__ __forceinline__ T narrow(Wide<T> x) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>)
    return __float2bfloat16_rn(x);
  else if constexpr (std::is_same_v<T, __half>)
    return __float2half_rn(x);
  else
    return x;
}

// Calls fn(std::type_identity<T>{}) with the element type of `dtype`.
template <typename Fn>
auto with_type(DType dtype, const Fn& fn) {
  switch (dtype) {
    case DType::kBFloat16:
      return fn(std::type_identity<__nv_bfloat16>{});
    case DType::kFloat16:
      return fn(std::type_identity<__half>{});
    case DType::kFloat64:
      return fn(std::type_identity<double>{});
    default:
      return fn(std::type_identity<float>{});
  }
}

// A row is moved in pieces of 16 bytes where rows and pointers allow it, else element by element.
constexpr int kPieceBytes = 16;
template <typename T>
constexpr int kPiece = kPieceBytes / static_cast<int>(sizeof(T));

template <typename... Pointers>
bool fits_pieces(int64_t row_bytes, Pointers... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) | ... | static_cast<uintptr_t>(row_bytes)) % kPieceBytes) == 0;
}

// Calls fn(std::integral_constant<int, N>{}) with the elements that a thread moves at once: kPiece<T> or 1.
template <typename T, typename Fn>
auto with_piece(bool whole, const Fn& fn) {
  return whole ? fn(std::integral_constant<int, kPiece<T>>{}) : fn(std::integral_constant<int, 1>{});
}

// The bits of N adjacent elements. Separate from widen(), so that a kernel can have several loads in flight.
template <typename T, int N>
struct Bits {
  std::conditional_t<N == 1, T, uint4> bits;

  __device__ __forceinline__ void unpack(Wide<T> (&x)[N]) const {
    T parts[N];
    memcpy(parts, &bits, sizeof(parts));
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = widen(parts[i]);
  }
};

template <int N, typename T>
__device__ __forceinline__ Bits<T, N> load(const T* p) {
  if constexpr (N == 1)
    return {*p};
  else
    return {__ldg(reinterpret_cast<const uint4*>(p))};
}

// For what is read once: evicted first, which leaves the caches to what is read again.
template <int N, typename T>
__device__ __forceinline__ Bits<T, N> load_once(const T* p) {
  if constexpr (N == 1)
    return {*p};
  else
    return {__ldcs(reinterpret_cast<const uint4*>(p))};
}

template <typename T, int N>
__device__ __forceinline__ void store(T* p, const Wide<T> (&x)[N]) {
  T parts[N];
#pragma unroll
  for (int i = 0; i < N; ++i) parts[i] = narrow<T>(x[i]);
  if constexpr (N == 1) {
    *p = parts[0];
  } else {
    uint4 bits;
    memcpy(&bits, parts, sizeof(bits));
    *reinterpret_cast<uint4*>(p) = bits;
  }
}

// Threads over a matrix: x along a row, y over rows; short rows share a block. A thread of `per_thread` pieces has
// those blockDim.x apart, so that a warp's access is contiguous.
struct Tiling {
  static constexpr int kThreads = 256;
  dim3 grid, block;

  Tiling(int64_t rows, int64_t pieces, int per_thread = 1) {
    unsigned x = 1;
    while (x < kThreads && static_cast<int64_t>(x) * per_thread < pieces) x *= 2;
    block = dim3(x, kThreads / x);
    grid = dim3(static_cast<unsigned>(at_most(ceil_div(rows, block.y), INT32_MAX)),
                static_cast<unsigned>(at_most(ceil_div(pieces, int64_t{x} * per_thread), 65535)));
  }
};

// Calls fn(row, first piece) for the thread's places in a Tiling.
template <typename Fn>
__device__ __forceinline__ void for_tiles(int64_t rows, int64_t pieces, int per_thread, const Fn& fn) {
  for (int64_t row = int64_t{blockIdx.x} * blockDim.y + threadIdx.y; row < rows;
       row += int64_t{gridDim.x} * blockDim.y) {
    for (int64_t piece = int64_t{blockIdx.y} * blockDim.x * per_thread + threadIdx.x; piece < pieces;
         piece += int64_t{gridDim.y} * blockDim.x * per_thread) {
      fn(row, piece);
    }
  }
}

// The sum over the warp, the same in every lane, in a fixed order.
template <typename Real>
__device__ __forceinline__ Real warp_sum(Real x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
  return x;
}

}  // namespace moe::cuda
