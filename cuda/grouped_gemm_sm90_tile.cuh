// The tiles of the sm_90a GEMMs: their shapes and their shared memory.
//
// 384 threads: warpgroup 0 fills a ring of stages (the producer), warpgroups 1 and 2 multiply and write the results. A
// stage holds 64 of the contracted width for the 128 rows and for the columns of the tile, in the 128-byte swizzle that
// TMA writes and wgmma reads. The math warpgroups either share each tile, 64 rows each, or take turns (ping-pong): each
// has every other tile, and finishes it while the other one multiplies.
#pragma once

#include "ptx/ptx.cuh"

namespace moe::cuda::sm90 {

constexpr int kTileRows = 128, kGroupRows = 64, kDepth = 64;
constexpr int kMathGroups = 2, kGroupThreads = 128, kThreads = (1 + kMathGroups) * kGroupThreads;
constexpr int kSwizzleBytes = 128, kSlabBytes = kGroupRows * kSwizzleBytes;

static_assert(kDepth * 2 == kSwizzleBytes, "a row of a stage is one row of the swizzle");
static_assert(kTileRows == kMathGroups * kGroupRows, "wgmma multiplies 64 rows per warpgroup");

// 65536 / kThreads, which is rounded down to a multiple of 8, for each thread: what setmaxnreg has to distribute.
constexpr int kBlockRegisters = 65536 / kThreads / 8 * 8 * kThreads;

enum class Math { kShareTiles, kTakeTurns };

template <int kColumns_, int kStages_, int kSlabs_, Math kMath, int kBlocks_, int kProducerRegisters_,
          int kMathRegisters_>
struct TileShape {
  static constexpr bool kTurns = kMath == Math::kTakeTurns;
  static constexpr int kColumns = kColumns_;
  static constexpr int kStages = kStages_;                   // of the ring between producer and math
  static constexpr int kSlabs = kSlabs_;                     // of 64 x 64 results, per math warpgroup
  static constexpr int kParts = kTurns ? 2 : 1;              // of 64 rows, that a math warpgroup has of a tile
  static constexpr int kSums = kColumns / 2;                 // accumulators per thread and part
  static constexpr bool kReadsWeightOnce = false;            // row tiles of one expert read the same
  static constexpr int kBlocks = kBlocks_;                   // of a cluster, which load a weight that they share once
  static constexpr int kReaders = 4 * kMathGroups / kParts;  // warps that hand a stage back
  static constexpr int kRowBytes = kTileRows * kSwizzleBytes, kColumnBytes = kColumns * kSwizzleBytes;
  static constexpr int kStageBytes = kRowBytes + kColumnBytes;
  static constexpr int kProducerRegisters = kProducerRegisters_, kMathRegisters = kMathRegisters_;
  // A thread of the producer keeps the addresses of the rows that it gathers.
  static constexpr bool kGathers = kProducerRegisters >= 56;
  static_assert(kColumns % 64 == 0 && kColumns <= 256, "the columns are whole chunks, and those of one wgmma");
  static_assert(kSlabs >= 2, "one slab is written while the store of the other is in flight");
  static_assert((kProducerRegisters + kMathGroups * kMathRegisters) * kGroupThreads <= kBlockRegisters,
                "a warpgroup would wait for ever for registers that the block does not have");
};

// The default, compute-bound: 48 KB per stage for 4.2 MFLOP, 128 accumulators per thread. At 700 TFLOP/s that is 8.2
// TB/s from the L2 cache, more than it gives; two blocks whose row tiles are neighbours of one expert need 5.5.
// Prediction: 700 TFLOP/s on an H200 where experts have 1000 rows, against 660 without the cluster.
using WideTile = TileShape<256, 4, 2, Math::kShareTiles, 2, 80, 208>;
// For products of so few tiles that wide ones would leave SMs idle.
using NarrowTile = TileShape<128, 4, 6, Math::kShareTiles, 1, 72, 216>;
// The weight gradient: its blocks share no operand.
using WgradTile = TileShape<256, 4, 2, Math::kShareTiles, 1, 72, 216>;
// The backward through the activation, whose epilogue takes as long as 16 stages: 128 accumulators, and six slabs for
// the pre-activations and gradients of 64 rows. Prediction for an H200: 64 stages of 512 clocks hide an epilogue of
// 8000 clocks, which sharing tiles does not: 550 TFLOP/s instead of 450.
using BackwardTile = TileShape<128, 4, 6, Math::kTakeTurns, 1, 72, 216>;
// Short contracted widths: 40 KB per stage for 3.1 MFLOP, 192 accumulators. Prediction for an H200 at K = 704: 11
// stages of 768 clocks take as long as the epilogue of 48 KB (3000 clocks and the drain of the ring), which is hidden:
// 600 TFLOP/s instead of 480.
using ShortTile = TileShape<192, 4, 4, Math::kTakeTurns, 2, 40, 232>;

// The stages between producer and math.
template <typename Tile>
struct alignas(1024) Pipeline {  // 1024: the period of the swizzle
  unsigned char stage[Tile::kStages][Tile::kStageBytes];
  uint64_t full[Tile::kStages], empty[Tile::kStages];
};

template <typename Tile>
struct Shared : Pipeline<Tile> {
  alignas(1024) unsigned char slab[kMathGroups][Tile::kSlabs][kSlabBytes];
  uint64_t saved[kMathGroups];  // the pre-activations of a warpgroup have arrived
  uint64_t turn[kMathGroups];   // the other warpgroup needs no more stages of its tile
  int is_last[kMathGroups];     // of those that computed parts of a tile
};
template <typename Tile>
constexpr bool kFits = sizeof(Shared<Tile>) <= 227 * 1024;
static_assert(kFits<WideTile> && kFits<NarrowTile> && kFits<WgradTile> && kFits<BackwardTile> && kFits<ShortTile>,
              "more shared memory than a block can have");

// Where a pipeline stands: which stage, and the parity of its barriers.
template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
  // Where it stands after that many stages.
  static __device__ __forceinline__ Ring after(uint32_t stages) {
    static_assert((kStages & (kStages - 1)) == 0, "2^32 is a multiple of it");
    return {static_cast<int>(stages % kStages), stages / kStages % 2};
  }
};

// Offset of 16-byte piece `piece` of row `row` in a swizzled block.
__device__ __forceinline__ uint32_t swizzled(int row, int piece) {
  return row * kSwizzleBytes + ((piece ^ (row & 7)) << 4);
}

// By thread 0; `arrivals` on a full barrier come from the producer.
template <typename Tile>
__device__ __forceinline__ void initialise_stages(Pipeline<Tile>& pipeline, int arrivals) {
  for (int s = 0; s < Tile::kStages; ++s) {
    ptx::mbar_init(ptx::smem_u32(&pipeline.full[s]), arrivals);
    ptx::mbar_init(ptx::smem_u32(&pipeline.empty[s]), Tile::kReaders * Tile::kBlocks);
  }
}

// Before anything else.
template <typename Tile>
__device__ __forceinline__ void initialise(Shared<Tile>& shared, int arrivals) {
  if (threadIdx.x == 0) {
    initialise_stages<Tile>(shared, arrivals);
    for (int g = 0; g < kMathGroups; ++g) {
      ptx::mbar_init(ptx::smem_u32(&shared.saved[g]), 1);
      ptx::mbar_init(ptx::smem_u32(&shared.turn[g]), kGroupThreads / 32);
    }
    if (!MOE_BUG(grouped_gemm_sm90, 7)) ptx::fence_mbar_init();
  }
  if (MOE_BUG(grouped_gemm_sm90, 8)) return;
  if constexpr (Tile::kBlocks == 1)
    __syncthreads();
  else
    ptx::cluster_sync();
}

// Before a block ends: the other block of the cluster may still write to its shared memory.
template <typename Tile>
__device__ __forceinline__ void finalise() {
  if (Tile::kBlocks > 1 && !MOE_BUG(grouped_gemm_sm90, 29)) ptx::cluster_sync();
}

// By one thread of a warp that has read a stage for the last time: the blocks that write to it may do so again. Where
// the blocks share no weight, one may be a round ahead and arrive at the other's barrier before that one's producer has
// seen the last phase end. It still sees it: the phase that the arrival counts for waits for the other's readers, too.
template <typename Tile>
__device__ __forceinline__ void hand_back(Pipeline<Tile>& pipeline, int stage) {
  const uint32_t empty = ptx::smem_u32(&pipeline.empty[stage]);
  ptx::mbar_arrive(empty);
  if constexpr (Tile::kBlocks > 1) ptx::mbar_arrive_cluster(ptx::mapa(empty, ptx::cluster_rank() ^ 1));
}

}  // namespace moe::cuda::sm90
