// Split-K of a tile whose sums are in registers, for weight gradients with fewer tiles than SMs: several blocks have a
// run of the expert's rows each. A math warpgroup leaves its sums in scratch and counts itself; the last to come adds
// those of all parts in their order, so that the sum is the same whoever is last.
#pragma once

#include "grouped_gemm_sm90_store.cuh"

namespace moe::cuda::sm90 {

struct RegisterParts {
  int count;          // the most parts of a tile; 1: none
  float* sums;        // [tiles, kMathGroups, count, sums of a thread, kGroupThreads]; nothing when there is one part
  int32_t* arrivals;  // [tiles, kMathGroups]; zero, and left as zero
};

// By a math warpgroup with its part of `parts` of a tile: false, or true with the whole.
template <typename Tile>
__device__ __forceinline__ bool add_parts(float (&sums)[Tile::kSums], Shared<Tile>& shared, const RegisterParts& split,
                                          int64_t tile, int group, int part, int parts) {
  const int64_t place = tile * kMathGroups + group;
  float* all = split.sums + place * split.count * Tile::kSums * kGroupThreads + threadIdx.x % kGroupThreads;
  const auto at = [all](int p, int i) { return all + (p * Tile::kSums + i) * kGroupThreads; };
#pragma unroll
  for (int i = 0; i < Tile::kSums; ++i) *at(part, i) = sums[i];
  if (!MOE_BUG(grouped_gemm_sm90, 31)) group_sync(group);  // all of the part is written
  if (is_group_leader()) {
    shared.is_last[group] = ptx::atom_acq_rel_add(split.arrivals + place, 1) == parts - 1;
    if (shared.is_last[group] && !MOE_BUG(grouped_gemm_sm90, 32)) ptx::st_release(split.arrivals + place, 0);
  }
  if (!MOE_BUG(grouped_gemm_sm90, 33)) group_sync(group);
  if (!shared.is_last[group]) return false;
#pragma unroll
  for (float& sum : sums) sum = 0;
#pragma unroll 1
  for (int p = 0; p < parts; ++p) {
    const int from = MOE_BUG(grouped_gemm_sm90, 34) ? (part + 1 + p) % parts : p;
#pragma unroll
    for (int i = 0; i < Tile::kSums; ++i) sums[i] += *at(from, i);
  }
  return true;
}

}  // namespace moe::cuda::sm90
