// Rows between ranks (their bytes: moe/ep_row.h): a warp has a row, and takes a token to or from its wire type.
#pragma once

#include <cuda_fp8.h>

#include "elements.cuh"
#include "moe/ep_row.h"

namespace moe::cuda {

// EpRow as a kernel argument: where the parts begin, in bytes.
struct RowLayout {
  int64_t bytes, hidden_size, hidden_bytes, scale_at, ids_at, weights_at, top_k, weight_bytes;
  bool quantised, fp8, has_ids, has_weights;

  explicit RowLayout(const EpRow& row)
      : bytes(row.bytes()),
        hidden_size(row.hidden_size),
        hidden_bytes(row.hidden_bytes()),
        scale_at(row.scale_at()),
        ids_at(row.ids_at()),
        weights_at(row.weights_at()),
        top_k(row.top_k),
        weight_bytes(row.weight_bytes()),
        quantised(row.wire != Wire::kInput),
        fp8(row.wire == Wire::kFp8),
        has_ids(row.has_ids),
        has_weights(row.has_weights) {}
};

constexpr int kRowsPerBlock = 8;  // a warp each
constexpr int kBlocksPerSM = 4;   // registers for the pieces in flight, rather than more warps

// The row of this warp; past the last where there are more warps than rows.
__device__ __forceinline__ int64_t row_of_warp() { return int64_t{blockIdx.x} * kRowsPerBlock + threadIdx.x / 32; }

inline dim3 blocks_of_rows(int64_t num_rows) { return dim3(static_cast<unsigned>(ceil_div(num_rows, kRowsPerBlock))); }

// Bytes from one place to another by a warp; zeros from null. Four pieces in flight, as in permute.
template <typename Piece>
__device__ __forceinline__ void copy_by_warp(void* to, const void* from, int64_t bytes) {
  constexpr int kInFlight = 4;
  const int64_t pieces = bytes / static_cast<int64_t>(sizeof(Piece));
  for (int64_t first = threadIdx.x % 32; first < pieces; first += 32 * kInFlight) {
    Piece copy[kInFlight] = {};
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (from && first + 32 * i < pieces) copy[i] = __ldg(static_cast<const Piece*>(from) + first + 32 * i);
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (first + 32 * i < pieces) static_cast<Piece*>(to)[first + 32 * i] = copy[i];
    }
  }
}

// Calls fn(Piece{}) with the largest piece in which rows of `bytes` bytes can be copied.
template <typename Fn, typename... Pointers>
auto with_copy_piece(DType dtype, int64_t bytes, const Fn& fn, Pointers... pointers) {
  if (fits_pieces(bytes, pointers...)) return fn(uint4{});
  return size_of(dtype) >= 4 ? fn(uint32_t{}) : fn(uint16_t{});
}

// Elements that a lane quantises at once, so that their bytes are a word.
constexpr int kQuad = 4;

template <typename T, int N>
struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Elements {
  T x[N];
};

// Calls fn(std::integral_constant<int, N>{}) with kQuad where tokens start on as much, else with 1.
template <typename T, typename Fn>
auto with_quad(int64_t hidden_size, const void* tokens, const Fn& fn) {
  const bool whole = hidden_size % kQuad == 0 && reinterpret_cast<uintptr_t>(tokens) % alignof(Elements<T, kQuad>) == 0;
  return whole ? fn(std::integral_constant<int, kQuad>{}) : fn(std::integral_constant<int, 1>{});
}

constexpr float kLargestFp8 = 448, kLargestInt8 = 127;

// x in [-448, 448] or NaN, by the processor's instruction where there is one.
__device__ __forceinline__ uint32_t to_fp8(float x) { return __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3); }
__device__ __forceinline__ float from_fp8(uint32_t bits) {
  const __half_raw half = __nv_cvt_fp8_to_halfraw(static_cast<__nv_fp8_storage_t>(bits), __NV_E4M3);
  return __half2float(__half(half));
}
__device__ __forceinline__ uint32_t to_int8(float x) {
  return static_cast<uint8_t>(static_cast<int8_t>(rintf(x == x ? x : 0.0f)));
}

// token: [hidden_size], or null for zeros. Returns the scale.
template <typename T, int N>
__device__ __forceinline__ float quantise_by_warp(uint8_t* out, const T* token, const RowLayout& row) {
  const int64_t lane = threadIdx.x % 32;
  const auto load_wide = [&](int64_t column, float (&x)[N]) {
    Elements<T, N> part = {};
    if (token) part = *reinterpret_cast<const Elements<T, N>*>(token + column);
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = static_cast<float>(widen(part.x[i]));
  };
  float most = 0;
  bool finite = true;
#pragma unroll 4
  for (int64_t column = lane * N; column < row.hidden_size; column += 32 * N) {
    float x[N];
    load_wide(column, x);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      most = fmaxf(most, fabsf(x[i]));
      finite &= fabsf(x[i]) < INFINITY;
    }
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, step));
  const float largest = row.fp8 ? kLargestFp8 : kLargestInt8;
  const float scale =
      __all_sync(~0u, finite) || MOE_BUG(ep, 6) ? most / largest : NAN;  // NaN and infinity are not lost
  const float inverse = scale > 0 ? 1 / scale : 0;
#pragma unroll 4
  for (int64_t column = lane * N; column < row.hidden_size; column += 32 * N) {
    float x[N];
    load_wide(column, x);
    uint32_t word = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      float q = x[i] * inverse;
      q = q < -largest ? -largest : q > largest ? largest : q;
      word |= (row.fp8 ? to_fp8(q) : to_int8(q)) << 8 * i;
    }
    if constexpr (N == 1)
      out[column] = static_cast<uint8_t>(word);
    else
      *reinterpret_cast<uint32_t*>(out + column) = word;
  }
  return scale;
}

// The inverse.
template <typename T, int N>
__device__ __forceinline__ void dequantise_by_warp(T* token, const uint8_t* in, const RowLayout& row) {
  const auto scale = static_cast<Wide<T>>(*reinterpret_cast<const float*>(in + row.scale_at));
#pragma unroll 4
  for (int64_t column = threadIdx.x % 32 * N; column < row.hidden_size; column += 32 * N) {
    uint32_t word = in[column];
    if constexpr (N > 1) word = *reinterpret_cast<const uint32_t*>(in + column);
    Elements<T, N> part;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const uint32_t bits = word >> 8 * i & 0xff;
      const float q = row.fp8 ? from_fp8(bits) : static_cast<float>(static_cast<int8_t>(bits));
      part.x[i] = narrow<T>(scale * static_cast<Wide<T>>(q));
    }
    *reinterpret_cast<Elements<T, N>*>(token + column) = part;
  }
}

// Rows that a caller gives may start anywhere; the kernels read words of them, so they get a copy that starts on 16
// bytes, which all rows then do.
inline Status align_rows(const uint8_t** rows, int64_t bytes, const CudaContext& cuda) {
  if (reinterpret_cast<uintptr_t>(*rows) % kPieceBytes == 0) return Status::kOk;
  auto* copy = allocate<uint8_t>(bytes, cuda);
  if (!copy) return Status::kOutOfMemory;
  const cudaError_t error =
      cudaMemcpyAsync(copy, *rows, static_cast<size_t>(bytes), cudaMemcpyDeviceToDevice, stream(cuda));
  *rows = copy;
  return check(error, "copy of rows", cuda);
}

}  // namespace moe::cuda
