// The tile for few rows per expert, where reading the weights once is all the work: they take the 64-row side of wgmma,
// and the rows its columns, of which there can be as few as 8.
//
// 256 threads: warpgroup 0 fills the stages, warpgroup 1 multiplies. A stage holds 64 of the contracted width for 128
// columns of C (two boxes of 64 rows of the weight: a gate part and an up part of the same columns, where there is a
// gate) and for at most 64 rows. Prediction for an H200: 8 stages keep 128 KB of weights in flight per SM, and 30 KB
// are enough for 4.2 TB/s; the weights of E128, I704, H2816 at 1 token (8 experts, 95 MB) need 23 us of bandwidth.
#pragma once

#include "epilogue.cuh"
#include "grouped_gemm_sm90_math.cuh"
#include "grouped_gemm_sm90_producer.cuh"

namespace moe::cuda::sm90 {

struct FewTile {
  static constexpr int kTokens = 64;    // rows of C
  static constexpr int kColumns = 128;  // of C
  static constexpr int kStages = 8;
  static constexpr int kReaders = kGroupThreads / 32, kBlocks = 1;
  static constexpr bool kReadsWeightOnce = true;  // an expert has one tile of rows, seldom more
  static constexpr int kRowBytes = kTokens * kSwizzleBytes, kColumnBytes = kColumns * kSwizzleBytes;
  static constexpr int kStageBytes = kRowBytes + kColumnBytes;
  static constexpr int kThreads = 2 * kGroupThreads;
};
static_assert(FewTile::kTokens == kSlabRows, "a tile is finished as one slab");
static_assert(FewTile::kThreads == kGemmThreads, "zero_unowned_rows is by all threads of the block");

struct FewShared : Pipeline<FewTile> {
  float slab[FewTile::kTokens * FewTile::kColumns];
  int is_last;  // of the blocks that computed parts of a tile
};
static_assert(sizeof(FewShared) <= 227 * 1024, "more shared memory than a block can have");

// sums[half] = 64 columns of C by kTokens rows.
template <int kTokens, typename T, bool kMnMajor>
__device__ __forceinline__ void multiply_few(float (&sums)[2][kTokens / 2], FewShared& shared,
                                             Ring<FewTile::kStages>& ring, int steps) {
  for_each_stage<FewTile>(
      shared, ring, steps,
      [&](uint32_t stage, bool first) {
        const uint32_t weight = stage + FewTile::kRowBytes;
#pragma unroll
        for (int k16 = 0; k16 < kDepth / 16; ++k16) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            multiply_step<T, kMnMajor, false>(sums[half], weight + half * kSlabBytes, stage, k16, !first || k16 > 0);
          }
        }
      },
      [] {});
}

// The sums as rows of C, in the order that finish_slab reads. Sum 4 j + 2 h + c of a thread belongs to row
// 8 j + 2 q + c of C and to column 16 warp + 8 h + g of its half.
template <int kTokens>
__device__ __forceinline__ void put_sums(float* slab, const float (&sums)[2][kTokens / 2]) {
  const int lane = threadIdx.x % 32, warp = static_cast<int>(threadIdx.x) % kGroupThreads / 32;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) {
      const int row = i / 4 * 8 + lane % 4 * 2 + i % 2, column = half * 64 + warp * 16 + i / 2 % 2 * 8 + lane / 4;
      *slab_place<float, FewTile::kColumns>(slab, row, column) = sums[half][i];
    }
  }
}

// The columns that wgmma gets for `rows` rows.
__device__ __forceinline__ int padded_tokens(int rows) {
  if (MOE_BUG(grouped_gemm_sm90_few, 1)) --rows;
  return rows <= 8 ? 8 : rows <= 16 ? 16 : rows <= 32 ? 32 : 64;
}

// slab = the product of a tile, `steps` stages of the contracted width.
template <typename T, bool kMnMajor>
__device__ __forceinline__ void multiply_tile(FewShared& shared, Ring<FewTile::kStages>& ring, int rows, int steps) {
  const auto with = [&]<int kTokens>(std::integral_constant<int, kTokens>) {
    float sums[2][kTokens / 2] = {};  // an accumulator that is not defined on entry makes ptxas serialise the wgmmas
    multiply_few<kTokens, T, kMnMajor>(sums, shared, ring, steps);
    put_sums<kTokens>(shared.slab, sums);
  };
  switch (padded_tokens(rows)) {
    case 8:
      return with(std::integral_constant<int, 8>{});
    case 16:
      return with(std::integral_constant<int, 16>{});
    case 32:
      return with(std::integral_constant<int, 32>{});
    default:
      return with(std::integral_constant<int, 64>{});
  }
}

}  // namespace moe::cuda::sm90
