// The tile of the sm_90a GEMMs: its shape, its shared memory, and how wgmma reads it.
//
// 384 threads: warpgroup 0 fills a ring of stages (the producer), warpgroups 1 and 2 multiply, 64 of the 128 rows each,
// and write the result. A stage holds 64 of the contracted width for the 128 rows and for the columns of the tile, in
// the 128-byte swizzle that TMA writes and wgmma reads.
#pragma once

#include "ptx/ptx.cuh"

namespace moe::cuda::sm90 {

constexpr int kTileRows = 128, kGroupRows = 64, kDepth = 64;
constexpr int kMathGroups = 2, kGroupThreads = 128, kThreads = (1 + kMathGroups) * kGroupThreads;
constexpr int kSwizzleBytes = 128, kSlabBytes = kGroupRows * kSwizzleBytes;
// A thread of the producer keeps the addresses of the rows that it gathers; a thread that multiplies keeps 128 sums.
constexpr int kProducerRegisters = 72, kMathRegisters = 216;

static_assert(kDepth * 2 == kSwizzleBytes, "a row of a stage is one row of the swizzle");
static_assert(kTileRows == kMathGroups * kGroupRows, "wgmma multiplies 64 rows per warpgroup");
static_assert((kProducerRegisters + kMathGroups * kMathRegisters) * kGroupThreads <= 65536,
              "the registers of all warpgroups come from one SM");

template <int kColumns_, int kStages_, int kSlabs_>
struct TileShape {
  static constexpr int kColumns = kColumns_;
  static constexpr int kStages = kStages_;                           // of the ring between producer and math
  static constexpr int kSlabs = kSlabs_;                             // of 64 x 64 results, per math warpgroup
  static constexpr int kSums = kColumns / 2;                         // accumulators per thread
  static constexpr int kReaders = kMathGroups * kGroupThreads / 32;  // warps that hand a stage back
  static constexpr int kRowBytes = kTileRows * kSwizzleBytes, kColumnBytes = kColumns * kSwizzleBytes;
  static constexpr int kStageBytes = kRowBytes + kColumnBytes;
  static_assert(kColumns == 128 || kColumns == 256, "columns are loaded as two boxes of whole 64-column chunks");
  static_assert(kSlabs >= 2, "one slab is written while the store of the other is in flight");
};

// The GEMMs that only store, and the forward with its activation: compute-bound, so the widest tile.
using WideTile = TileShape<256, 4, 2>;
// The backward through the activation: its pre-activations and gradients need twelve slabs, so half the columns. Also
// for products of so few tiles that wide ones would leave SMs idle.
using NarrowTile = TileShape<128, 4, 6>;

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
};
static_assert(sizeof(Shared<WideTile>) <= 227 * 1024, "more shared memory than a block can have");
static_assert(sizeof(Shared<NarrowTile>) <= 227 * 1024, "more shared memory than a block can have");

// Where a pipeline stands: which stage, and the parity of its barriers.
template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

// wgmma matrix descriptor of an operand in the 128-byte swizzle (PTX: "Matrix descriptor format"). Eight rows of 128
// bytes are one pattern of 1024 bytes; `chunk_stride` leads from 64 rows (or columns) to the next, MN-major only.
__device__ __forceinline__ uint64_t descriptor(uint32_t address, uint32_t chunk_stride) {
  constexpr uint64_t kSwizzle128 = 1, kPattern = 1024;
  return uint64_t((address & 0x3ffff) >> 4) | uint64_t(chunk_stride >> 4) << 16 | kPattern >> 4 << 32 |
         kSwizzle128 << 62;
}

// The descriptor of step k16 (of 4) within a stage.
// K-major: a row of shared memory is one row of the operand, and the step is 32 bytes further in it.
// MN-major: a row of shared memory is one k, in chunks of 64 rows (or columns); the step is 16 rows further.
template <bool kMnMajor>
__device__ __forceinline__ uint64_t step_descriptor(uint32_t address, int k16) {
  const uint32_t kChunk = kSwizzleBytes * kDepth / (MOE_BUG(grouped_gemm_sm90, 1) ? 2 : 1);
  return kMnMajor ? descriptor(address + k16 * 16 * kSwizzleBytes, kChunk) : descriptor(address + k16 * 32, 16);
}

// Offset of 16-byte piece `piece` of row `row` in a swizzled block.
__device__ __forceinline__ uint32_t swizzled(int row, int piece) {
  return row * kSwizzleBytes + ((piece ^ (row & 7)) << 4);
}

template <typename T, bool kRowsMnMajor, bool kColumnsMnMajor, int kSums>
__device__ __forceinline__ void multiply_step(float (&sums)[kSums], uint32_t rows, uint32_t columns, int k16,
                                              bool accumulate) {
  const uint64_t a = step_descriptor<kRowsMnMajor>(rows, k16), b = step_descriptor<kColumnsMnMajor>(columns, k16);
  ptx::wgmma<2 * kSums, T, kRowsMnMajor, kColumnsMnMajor>(sums, a, b, accumulate);
}

// The main loop of a math warpgroup: issue(stage, first) starts the wgmmas of each of `steps` stages. One group of them
// stays in flight; a stage is handed back when the group after it has been issued.
template <typename Tile, typename Issue>
__device__ __forceinline__ void for_each_stage(Pipeline<Tile>& pipeline, Ring<Tile::kStages>& ring, int steps,
                                               const Issue& issue) {
  const bool leader = threadIdx.x % 32 == 0;
  int previous = 0;
  for (int step = 0; step < steps; ++step) {
    ptx::mbar_wait(ptx::smem_u32(&pipeline.full[ring.stage]), MOE_BUG(grouped_gemm_sm90, 2) ? 0 : ring.parity);
    if (!MOE_BUG(grouped_gemm_sm90, 3)) ptx::wgmma_fence();
    issue(ptx::smem_u32(pipeline.stage[ring.stage]), step == 0);
    if (!MOE_BUG(grouped_gemm_sm90, 4)) ptx::wgmma_commit();
    if (MOE_BUG(grouped_gemm_sm90, 5))
      previous = ring.stage;  // handed back while it is still read
    else
      ptx::wgmma_wait<1>();
    if (step > 0 && leader) ptx::mbar_arrive(ptx::smem_u32(&pipeline.empty[previous]));
    previous = ring.stage;
    ring.advance();
  }
  if (!MOE_BUG(grouped_gemm_sm90, 6)) ptx::wgmma_wait<0>();
  if (leader) ptx::mbar_arrive(ptx::smem_u32(&pipeline.empty[previous]));
}

// sums = the product of `steps` stages, for the 64 rows of one math warpgroup.
template <typename Tile, typename T, bool kRowsMnMajor, bool kColumnsMnMajor>
__device__ __forceinline__ void multiply(float (&sums)[Tile::kSums], Shared<Tile>& shared, Ring<Tile::kStages>& ring,
                                         int steps, int group) {
  for_each_stage<Tile>(shared, ring, steps, [&](uint32_t stage, bool first) {
    // Either way 64 rows are 8 KB: 64 rows of 128 bytes, or one chunk of 64 rows with 64 k.
    const uint32_t rows = stage + group * kSlabBytes, columns = stage + Tile::kRowBytes;
#pragma unroll
    for (int k16 = 0; k16 < kDepth / 16; ++k16) {
      multiply_step<T, kRowsMnMajor, kColumnsMnMajor>(sums, rows, columns, k16, !first || k16 > 0);
    }
  });
}

// The same stages, for a warpgroup none of whose rows exist.
template <typename Tile>
__device__ __forceinline__ void skip(Pipeline<Tile>& pipeline, Ring<Tile::kStages>& ring, int steps) {
  for (int step = 0; step < steps; ++step) {
    ptx::mbar_wait(ptx::smem_u32(&pipeline.full[ring.stage]), ring.parity);
    if (threadIdx.x % 32 == 0) ptx::mbar_arrive(ptx::smem_u32(&pipeline.empty[ring.stage]));
    ring.advance();
  }
}

// By thread 0; `arrivals` on a full barrier come from the producer.
template <typename Tile>
__device__ __forceinline__ void initialise_stages(Pipeline<Tile>& pipeline, int arrivals) {
  for (int s = 0; s < Tile::kStages; ++s) {
    ptx::mbar_init(ptx::smem_u32(&pipeline.full[s]), arrivals);
    ptx::mbar_init(ptx::smem_u32(&pipeline.empty[s]), Tile::kReaders);
  }
}

// Before anything else.
template <typename Tile>
__device__ __forceinline__ void initialise(Shared<Tile>& shared, int arrivals) {
  if (threadIdx.x == 0) {
    initialise_stages<Tile>(shared, arrivals);
    for (int g = 0; g < kMathGroups; ++g) ptx::mbar_init(ptx::smem_u32(&shared.saved[g]), 1);
    if (!MOE_BUG(grouped_gemm_sm90, 7)) ptx::fence_mbar_init();
  }
  if (!MOE_BUG(grouped_gemm_sm90, 8)) __syncthreads();
}

}  // namespace moe::cuda::sm90
