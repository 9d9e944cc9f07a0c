// The tile for few rows per expert, where reading the weights once is all the work: they take the 64-row side of wgmma,
// and the rows its columns, of which there can be as few as 8.
//
// 256 threads: warpgroup 0 fills the stages, warpgroup 1 multiplies. A stage holds 64 of the contracted width for 128
// columns of C (two boxes of 64 rows of the weight: a gate part and an up part of the same columns, where there is a
// gate) and for at most 64 rows. Prediction for an H200: 8 stages keep 128 KB of weights in flight per SM, and 30 KB
// are enough for 4.2 TB/s; the weights of E128, I704, H2816 at 1 token (8 experts, 95 MB) need 23 us of bandwidth.
#pragma once

#include "epilogue.cuh"
#include "grouped_gemm_sm90_maps.h"
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

// A part of a tile: a run of the stages of the contracted width.
struct PartAt : TileAt {
  int part, first_step, steps;
};

// The weight's part of a stage, by thread 0.
template <typename Args>
__device__ __forceinline__ void load_columns(const Filler<FewTile>& filler, const CUtensorMap& weight, const Args& args,
                                             const PartAt& at, int step) {
  filler.expect(FewTile::kColumnBytes);
  load_weight(filler, weight, args, at, step * kDepth);
}

// Fills the stages of all parts that `walk` leads to; source_of as in RowCopier. Of the first `ahead` stages the
// weights are on their way already. By the producer warpgroup; of Args: rows, n, k, in_out, concat.
template <typename T, typename Walk, typename Args, typename SourceOf>
__device__ __forceinline__ void produce_parts(FewShared& shared, const CUtensorMap& weight, const Args& args, Walk walk,
                                              const SourceOf& source_of, int ahead = 0) {
  Filler<FewTile> filler(shared);
  RowCopier<T, FewTile::kTokens> copier(args.rows, args.k);
  PartAt at;
  while (walk.next(at)) {
    copier.set_rows(source_of, at.first_row, at.rows);
    const int tokens = padded_tokens(at.rows);
    for (int step = at.first_step; step < at.first_step + at.steps; ++step) {
      filler.acquire();
      if (threadIdx.x == 0 && --ahead < 0) load_columns(filler, weight, args, at, step);
      copier.copy(filler.rows(), int64_t{step} * kDepth, tokens);
      filler.commit_copies();
    }
  }
  filler.finish_copies();
}

// Multiplies all parts that `walk` leads to; finish(at) has each in the slab. By the math warpgroup.
template <typename T, typename Walk, typename Finish>
__device__ __forceinline__ void consume_parts(FewShared& shared, bool in_out, Walk walk, const Finish& finish) {
  Ring<FewTile::kStages> ring;
  PartAt at;
  while (walk.next(at)) {
    if (in_out)
      multiply_tile<T, true>(shared, ring, at.rows, at.steps);
    else
      multiply_tile<T, false>(shared, ring, at.rows, at.steps);
    if (!MOE_BUG(grouped_gemm_sm90_few, 7)) ptx::bar_sync(1, kGroupThreads);
    finish(at);
    if (!MOE_BUG(grouped_gemm_sm90_few, 2)) ptx::bar_sync(1, kGroupThreads);
  }
}

// The tensor map of a weight in the boxes that load_weight asks for.
template <typename T>
Status encode_weight(CUtensorMap* map, const GemmTask& task, const CudaContext& cuda) {
  const MapShape shape = task.weight_layout == WeightLayout::kInOut
                             ? experts_shape(task.num_experts, task.k, task.n, kDepth)
                             : experts_shape(task.num_experts, task.n, task.k, FewTile::kColumns / 2);
  return encode_map(map, static_cast<const T*>(task.weight), shape, cuda);
}

}  // namespace moe::cuda::sm90
