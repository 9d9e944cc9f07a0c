// Split-K: several blocks compute parts of one tile, each a run of the contracted width. Every block leaves its part in
// scratch and counts itself; the last to come adds the parts in their order, so that the sum is the same whoever is
// last.
#pragma once

#include "grouped_gemm_sm90_few.cuh"

namespace moe::cuda::sm90 {

struct SplitK {
  int parts;
  float* sums;        // [parts, R, width]; nothing when there is one part
  int32_t* arrivals;  // per tile; zero, and left as zero
  int64_t num_rows, width;

  // Stages of part `part`, of `steps` in all; part <= steps.
  __device__ __forceinline__ int first_step(int steps, int part) const {
    return static_cast<int>(int64_t{steps} * part / parts);
  }
};

// Calls fn(four values in the slab, their place in a part), by the math warpgroup, for the first `rows` rows.
template <typename Fn>
__device__ __forceinline__ void for_pieces_of_part(FewShared& shared, const SplitK& split, int first_row, int rows,
                                                   int64_t column, const Fn& fn) {
  constexpr int kColumns = FewTile::kColumns, kPerRow = kColumns / 4;
  for (int i = static_cast<int>(threadIdx.x) % kGroupThreads; i < rows * kPerRow; i += kGroupThreads) {
    const int c = i % kPerRow * 4;
    fn(reinterpret_cast<float4*>(slab_place<float, kColumns>(shared.slab, i / kPerRow, c)),
       (first_row + i / kPerRow) * split.width + column + c);
  }
}

// Copies the slab to scratch.
__device__ __forceinline__ void leave_part(FewShared& shared, const SplitK& split, int part, int first_row, int rows,
                                           int64_t column) {
  float* sums = split.sums + part * split.num_rows * split.width;
  for_pieces_of_part(shared, split, first_row, rows, column,
                     [&](const float4* slab, int64_t at) { *reinterpret_cast<float4*>(sums + at) = *slab; });
}

// By the math warpgroup, whose part of a tile is in the slab: false, or true with the whole sum in the slab.
__device__ __forceinline__ bool add_parts(FewShared& shared, const SplitK& split, int part, int tile, int first_row,
                                          int rows, int64_t column) {
  leave_part(shared, split, part, first_row, rows, column);
  ptx::bar_sync(1, kGroupThreads);  // all of the part is written
  if (threadIdx.x % kGroupThreads == 0) {
    shared.is_last = ptx::atom_acq_rel_add(split.arrivals + tile, 1) == split.parts - 1;
    if (shared.is_last && !MOE_BUG(grouped_gemm_sm90_few, 3)) ptx::st_release(split.arrivals + tile, 0);
  }
  if (!MOE_BUG(grouped_gemm_sm90_few, 4)) ptx::bar_sync(1, kGroupThreads);
  if (!shared.is_last) return false;
  for_pieces_of_part(shared, split, first_row, rows, column, [&](float4* slab, int64_t at) {
    float4 sum{};
    for (int p = 0; p < split.parts; ++p) {
      const int from = MOE_BUG(grouped_gemm_sm90_few, 5) ? (part + 1 + p) % split.parts : p;
      const float4 x = *reinterpret_cast<const float4*>(split.sums + from * split.num_rows * split.width + at);
      sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
    }
    *slab = sum;
  });
  if (!MOE_BUG(grouped_gemm_sm90_few, 6)) ptx::bar_sync(1, kGroupThreads);
  return true;
}

}  // namespace moe::cuda::sm90
