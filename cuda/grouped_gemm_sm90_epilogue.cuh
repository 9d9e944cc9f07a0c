// What happens to the sums of a tile: bias and store, or bias, activation and two stores.
#pragma once

#include "activation.cuh"
#include "grouped_gemm.cuh"
#include "grouped_gemm_sm90_producer.cuh"
#include "grouped_gemm_sm90_store.cuh"

namespace moe::cuda::sm90 {

// Everything a kernel takes beside its tensor maps.
template <typename T>
struct GemmArgs {
  T* output;          // [R, N], or [R, I] with an activation
  T* pre_activation;  // [R, N] or null; the backward writes its gradient here
  float* partials;    // [R, num_partials] or null
  const T* rows;      // read when there is a gather
  const T* bias;
  const float* row_weights;
  Gather gather;
  TileSchedule schedule;
  Gate<T> gate;
  int64_t n, k;
  int num_rows, num_experts, column_tiles, num_partials;
  bool in_out, concat;  // concat: the two halves of a tile's columns are gates and ups
};

struct GemmMaps {
  CUtensorMap rows, weight, output, pre_activation;  // as in GemmArgs
  CUtensorMap saved;                                 // the backward's pre-activations
};

template <typename Tile, typename T>
__device__ __forceinline__ void add_bias(float (&sums)[Tile::kSums], const GemmArgs<T>& args, int expert,
                                         int column_tile) {
  if (args.bias == nullptr) return;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int column =
        static_cast<int>(weight_column<Tile>(args, column_tile, half * (Tile::kColumns / 2))) + sum_column(0);
    const int end = static_cast<int>(args.n);
    const T* bias = args.bias + expert * args.n + column;
#pragma unroll
    for (int j = 0; j < Tile::kColumns / 16; ++j) {
      if (column + j * 8 >= end) continue;
      const float2 b = unpack<T>(__ldg(reinterpret_cast<const uint32_t*>(bias + j * 8)));
      const int i = half * (Tile::kSums / 2) + 4 * j;
      sums[i] += b.x, sums[i + 1] += b.y, sums[i + 2] += b.x, sums[i + 3] += b.y;
    }
  }
}

// [R, N] or [R, 2, N / 2] as stored.
template <typename Tile, typename T>
__device__ __forceinline__ void store_columns(const float (&sums)[Tile::kSums], Slabs<Tile>& slabs,
                                              const Destination<T>& to, bool concat, int column_tile, int row,
                                              int rows) {
  constexpr int kHalf = Tile::kColumns / 2;
  const auto store = [&]<int kSlab>(std::integral_constant<int, kSlab>) {
    constexpr int kPart = kSlab * 64 / kHalf, kInside = kSlab * 64 % kHalf;
    const int64_t column =
        concat ? int64_t{column_tile} * kHalf + kInside : int64_t{column_tile} * Tile::kColumns + kSlab * 64;
    if (column >= to.part_columns) return;
    slabs.store(to, row, rows, concat ? kPart : 0, column,
                [&](unsigned char* slab) { fill_slab<T, kSlab * 32>(slab, sums); });
  };
  [&]<int... kSlab>(std::integer_sequence<int, kSlab...>) {
    (store(std::integral_constant<int, kSlab>{}), ...);
  }(std::make_integer_sequence<int, Tile::kColumns / 64>{});
}

// The activation of neighbouring columns, left in every other sum: 32 activations per 64 columns.
template <typename T, int kFirst, int kSums>
__device__ __forceinline__ void fill_slab_of_pairs(unsigned char* slab, const float (&sums)[kSums]) {
#pragma unroll
  for (int j = 0; j < 16; ++j) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int column = 4 * j + static_cast<int>(threadIdx.x) % 4;
      *reinterpret_cast<T*>(slab + swizzled(sum_row(h), column / 8) + column % 8 * 2) =
          narrow<T>(sums[kFirst + 4 * j + 2 * h]);
    }
  }
}

// The sums become activations in place. Concat: sum i and sum i + kSums / 2 are gate and up of one column.
// Interleaved: sums 2 i and 2 i + 1 are, and the result stays in 2 i.
template <int kUnroll, typename T, typename Act, int kSums>
__device__ __forceinline__ void activate_each(Act act, float (&sums)[kSums], const Gate<T>& gate) {
  if (!gate.gated) {
#pragma unroll kUnroll
    for (int i = 0; i < kSums; ++i) sums[i] = activate<T>(act, gate, sums[i], 0.0f);
  } else if (gate.interleaved) {
#pragma unroll kUnroll
    for (int i = 0; i < kSums; i += 2) sums[i] = activate<T>(act, gate, sums[i], sums[i + 1]);
  } else {
#pragma unroll kUnroll
    for (int i = 0; i < kSums / 2; ++i) sums[i] = activate<T>(act, gate, sums[i], sums[i + kSums / 2]);
  }
}

// Calls fn(act, sums, std::integral_constant<int, unroll>). Registers can only be indexed by unrolled loops, and those
// for every activation take ptxas minutes: all but the usual one go through a copy in local memory and a loop.
template <int kSums, typename Fn>
__device__ __forceinline__ void with_sums(Activation kind, float (&sums)[kSums], const Fn& fn) {
  if (kind == Activation::kSwiGLU || kind == Activation::kSiLU) {
    return fn(SiLU{}, sums, std::integral_constant<int, kSums>{});
  }
  float copy[kSums];
#pragma unroll
  for (int i = 0; i < kSums; ++i) copy[i] = sums[i];
  with_activation(kind, [&](auto act) { fn(act, copy, std::integral_constant<int, 1>{}); });
#pragma unroll
  for (int i = 0; i < kSums; ++i) sums[i] = copy[i];
}

template <typename Tile, typename T>
__device__ __forceinline__ void store_activations(const float (&sums)[Tile::kSums], Slabs<Tile>& slabs,
                                                  const Destination<T>& to, const Gate<T>& gate, int column_tile,
                                                  int row, int rows) {
  if (!gate.gated) return store_columns<Tile, T>(sums, slabs, to, false, column_tile, row, rows);
  const int64_t column = int64_t{column_tile} * (Tile::kColumns / 2);
  const auto store = [&]<int kSlab>(std::integral_constant<int, kSlab>) {
    if (column + kSlab * 64 >= to.part_columns) return;
    slabs.store(to, row, rows, 0, column + kSlab * 64, [&](unsigned char* slab) {
      if (gate.interleaved)
        fill_slab_of_pairs<T, kSlab * 64>(slab, sums);
      else
        fill_slab<T, kSlab * 32>(slab, sums);
    });
  };
  store(std::integral_constant<int, 0>{});
  if constexpr (Tile::kColumns == 256) store(std::integral_constant<int, 1>{});
}

}  // namespace moe::cuda::sm90
