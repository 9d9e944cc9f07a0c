// The plan of a few slots, which every block makes for itself in shared memory: a thread has a slot. That takes a
// microsecond, and no kernel before the first product: neither plan's nor the schedule's.
#pragma once

#include "experts_few.h"
#include "grouped_gemm_sm90_few.cuh"
#include "grouped_gemm_sm90_split.cuh"

namespace moe::cuda::sm90 {

struct SlotPlan {
  static constexpr int kMost = static_cast<int>(kMostFewSlots);

  uint16_t expert_of_slot[kMost];
  int16_t row_of_slot[kMost];     // or -1
  uint16_t first_row[kMost + 1];  // of each tile of at most FewTile::kTokens rows of one expert; then the rows in all
  uint8_t slot_of_row[kMost];     // inside an expert, rows keep slot order
  int num_tiles;
};
static_assert(SlotPlan::kMost == FewTile::kThreads, "make_plan gives each thread a slot");

// What is needed only while a plan is made.
struct SlotPlanScratch {
  static constexpr int kWarps = SlotPlan::kMost / 32;

  int32_t expert_of_slot[SlotPlan::kMost];  // kNone: of none
  bool starts_tile[SlotPlan::kMost];        // by row
  uint32_t tiles[kWarps], kept[kWarps];     // bits: rows that start a tile, slots that have a row
};

// By all threads of a block. topk_ids may hold anything: an id outside [0, num_experts) has no row. They are read past
// the L1 cache, because the kernel before this one may still run (see the kernel).
__device__ __forceinline__ void make_plan(SlotPlan& plan, SlotPlanScratch& scratch, const int32_t* topk_ids,
                                          int num_slots, int num_experts) {
  constexpr int32_t kNone = INT32_MAX;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  int32_t mine = thread < num_slots ? ptx::ld_acquire(topk_ids + thread) : kNone;
  if (mine < 0 || mine >= num_experts) mine = kNone;
  scratch.expert_of_slot[thread] = mine;
  scratch.starts_tile[thread] = false;
  if (!MOE_BUG(experts_sm90_few, 1)) __syncthreads();

  int before = 0, inside = 0;  // rows of lower experts, and of this one before the slot's own
  for (int slot = 0; slot < num_slots; ++slot) {
    const int32_t other = scratch.expert_of_slot[slot];
    before += other < mine;
    inside += other == mine && slot < thread + (MOE_BUG(experts_sm90_few, 2) ? 1 : 0);
  }
  const int row = mine == kNone ? -1 : before + inside;
  plan.expert_of_slot[thread] = static_cast<uint16_t>(mine);
  plan.row_of_slot[thread] = static_cast<int16_t>(row);
  if (row >= 0) {
    plan.slot_of_row[row] = static_cast<uint8_t>(thread);
    scratch.starts_tile[row] = inside % FewTile::kTokens == 0;
  }
  if (!MOE_BUG(experts_sm90_few, 3)) __syncthreads();

  const bool starts = scratch.starts_tile[thread];  // of row `thread`
  const uint32_t tiles = __ballot_sync(~0u, starts), kept = __ballot_sync(~0u, row >= 0);
  if (lane == 0) scratch.tiles[warp] = tiles, scratch.kept[warp] = kept;
  if (!MOE_BUG(experts_sm90_few, 4)) __syncthreads();
  int tile = __popc(tiles & ((1u << lane) - 1)), num_tiles = 0, num_rows = 0;
#pragma unroll
  for (int w = 0; w < SlotPlanScratch::kWarps; ++w) {
    if (w < warp) tile += __popc(scratch.tiles[w]);
    num_tiles += __popc(scratch.tiles[w]);
    num_rows += __popc(scratch.kept[w]);
  }
  if (starts) plan.first_row[tile] = static_cast<uint16_t>(thread);
  if (thread == 0) plan.first_row[num_tiles] = static_cast<uint16_t>(num_rows), plan.num_tiles = num_tiles;
  if (!MOE_BUG(experts_sm90_few, 5)) __syncthreads();
}

// How many slots of a token have a row.
__device__ __forceinline__ int kept_slots(const SlotPlan& plan, int token, int top_k) {
  int kept = 0;
  for (int slot = token * top_k; slot < (token + 1) * top_k; ++slot) kept += plan.row_of_slot[slot] >= 0;
  return kept;
}

// The parts of tiles of a block: all tiles of the first columns, then those of the next, so that a token's columns are
// whole soon, and the sums over its rows do not all wait for the end of the kernel.
class SlotWalk {
 public:
  __device__ SlotWalk(const SlotPlan& plan, int column_tiles, int64_t depth, const SplitK& split)
      : plan_(plan),
        split_(split),
        steps_(static_cast<int>((depth + kDepth - 1) / kDepth)),
        end_(static_cast<uint32_t>(plan.num_tiles) * static_cast<uint32_t>(column_tiles * split.parts)) {}

  __device__ bool next(PartAt& at) {
    if (next_ >= end_) return false;
    const int of_tile = static_cast<int>(next_ / static_cast<uint32_t>(split_.parts));
    at.part = static_cast<int>(next_ % static_cast<uint32_t>(split_.parts));
    at.row_tile = of_tile % plan_.num_tiles;
    at.column_tile = of_tile / plan_.num_tiles;
    at.first_row = plan_.first_row[at.row_tile];
    at.rows = plan_.first_row[at.row_tile + 1] - at.first_row;
    at.expert = plan_.expert_of_slot[plan_.slot_of_row[at.first_row]];
    at.is_shared = false;
    at.first_step = split_.first_step(steps_, at.part);
    at.steps = split_.first_step(steps_, at.part + 1) - at.first_step;
    next_ += gridDim.x;
    return true;
  }

 private:
  const SlotPlan& plan_;
  const SplitK& split_;
  const int steps_;
  const uint32_t end_;
  uint32_t next_ = blockIdx.x;
};

}  // namespace moe::cuda::sm90
