// plan: which row goes where?
//
// A stable counting sort of the slots by expert: rows of expert e are [expert_offsets[e], expert_offsets[e + 1]), and
// inside an expert rows keep slot order. Cost O(R + E).
//   row_to_slot[slot_to_row[slot]] == slot for every kept slot.
//   An id outside [0, E) keeps no row (slot_to_row = -1): that is how dropped slots and experts of other ranks are
//   written. capacity >= 0: of each expert only the first `capacity` slots are kept, the rest are dropped. Rows past
//   expert_offsets[E] have row_to_slot = -1.
#pragma once

#include "moe/cuda.h"

namespace moe {

struct PlanArgs {
  int32_t* expert_offsets;  // [E + 1]
  int32_t* row_to_slot;     // [R]
  int32_t* slot_to_row;     // [T, K]
  const int32_t* topk_ids;  // [T, K]
  int64_t num_tokens, num_experts, top_k;
  int64_t capacity;  // rows per expert at most; -1: no limit
};

Status plan_cpu(const PlanArgs& args, const ThreadPool& pool);
Status plan_cuda(const PlanArgs& args, const CudaContext& cuda);

// What a later stage reads of a plan. There may be fewer rows than slots, when it is known that the others would hold
// nothing: every R of a later stage is then num_rows. The maps may come from a user: an offset is clamped to [previous
// offset, R], and a slot or row out of range counts as dropped, so nothing is ever read or written out of bounds.
struct PlanView {
  const int32_t* expert_offsets;  // [E + 1]
  const int32_t* row_to_slot;     // [R]
  const int32_t* slot_to_row;     // [T, K]
  int64_t num_tokens, num_experts, top_k;
  int64_t num_rows;  // at most T * K
};

}  // namespace moe
