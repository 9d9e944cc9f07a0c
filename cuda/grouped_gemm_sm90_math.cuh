// How wgmma reads a stage, and the main loop of the math warpgroups.
#pragma once

#include "grouped_gemm_sm90_tile.cuh"

namespace moe::cuda::sm90 {

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

template <typename T, bool kRowsMnMajor, bool kColumnsMnMajor, int kSums>
__device__ __forceinline__ void multiply_step(float (&sums)[kSums], uint32_t rows, uint32_t columns, int k16,
                                              bool accumulate) {
  const uint64_t a = step_descriptor<kRowsMnMajor>(rows, k16), b = step_descriptor<kColumnsMnMajor>(columns, k16);
  ptx::wgmma<2 * kSums, T, kRowsMnMajor, kColumnsMnMajor>(sums, a, b, accumulate);
}

// The main loop of a math warpgroup: issue(stage, first) starts the wgmmas of each of `steps` stages. One group of them
// stays in flight; a stage is handed back when the group after it has been issued. issued() is called after the last.
template <typename Tile, typename Issue, typename Issued>
__device__ __forceinline__ void for_each_stage(Pipeline<Tile>& pipeline, Ring<Tile::kStages>& ring, int steps,
                                               const Issue& issue, const Issued& issued) {
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
    if (step > 0 && leader) hand_back<Tile>(pipeline, previous);
    previous = ring.stage;
    ring.advance();
  }
  issued();
  if (!MOE_BUG(grouped_gemm_sm90, 6)) ptx::wgmma_wait<0>();
  if (leader) hand_back<Tile>(pipeline, previous);
}

// sums = the product of `steps` stages, for the parts that one math warpgroup has of a tile, from part `first_part` on.
template <typename Tile, typename T, bool kRowsMnMajor, bool kColumnsMnMajor, typename Issued>
__device__ __forceinline__ void multiply(float (&sums)[Tile::kParts][Tile::kSums], Shared<Tile>& shared,
                                         Ring<Tile::kStages>& ring, int steps, int first_part, const Issued& issued) {
  for_each_stage<Tile>(
      shared, ring, steps,
      [&](uint32_t stage, bool first) {
        // Either way 64 rows are 8 KB: 64 rows of 128 bytes, or one chunk of 64 rows with 64 k.
        const uint32_t rows = stage + first_part * kSlabBytes, columns = stage + Tile::kRowBytes;
#pragma unroll
        for (int k16 = 0; k16 < kDepth / 16; ++k16) {
#pragma unroll
          for (int part = 0; part < Tile::kParts; ++part) {
            multiply_step<T, kRowsMnMajor, kColumnsMnMajor>(sums[part], rows + part * kSlabBytes, columns, k16,
                                                            !first || k16 > 0);
          }
        }
      },
      issued);
}

// The same stages, for a warpgroup none of whose rows exist.
template <typename Tile>
__device__ __forceinline__ void skip(Pipeline<Tile>& pipeline, Ring<Tile::kStages>& ring, int steps) {
  for (int step = 0; step < steps; ++step) {
    ptx::mbar_wait(ptx::smem_u32(&pipeline.full[ring.stage]), ring.parity);
    if (threadIdx.x % 32 == 0) hand_back<Tile>(pipeline, ring.stage);
    ring.advance();
  }
}

// Whose turn it is to multiply, when the math warpgroups have every other tile. Their stages follow each other in one
// ring: a warpgroup that waited for its own before the other has seen all of the tile between would take a stage that
// is yet to be filled for one that is.
template <typename Tile>
class Turns {
 public:
  __device__ Turns(Shared<Tile>& shared, int group) : shared_(shared), group_(group) {}

  // Whether tile number `count` of the block is this warpgroup's.
  __device__ __forceinline__ bool has(int count) const { return !Tile::kTurns || count % kMathGroups == group_; }
  __device__ __forceinline__ void wait(int count) const {
    if (!Tile::kTurns || MOE_BUG(grouped_gemm_sm90, 26)) return;
    ptx::mbar_wait(ptx::smem_u32(&shared_.turn[group_]), count / kMathGroups % 2 ^ (group_ == 0 ? 1 : 0));
  }
  __device__ __forceinline__ void pass() const {
    if (Tile::kTurns && threadIdx.x % 32 == 0) ptx::mbar_arrive(ptx::smem_u32(&shared_.turn[1 - group_]));
  }

 private:
  Shared<Tile>& shared_;
  const int group_;
};

}  // namespace moe::cuda::sm90
