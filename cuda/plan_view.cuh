// Reading a plan on the device. It may come from a user: whatever it holds, nothing out of bounds is read or written.
#pragma once

#include "elements.cuh"
#include "moe/plan.h"

namespace moe::cuda {

__host__ __device__ inline int64_t num_slots(const PlanView& plan) { return plan.num_tokens * plan.top_k; }

// The row of a slot, or -1: dropped.
__device__ __forceinline__ int64_t row_of(const PlanView& plan, int64_t slot) {
  const int64_t row = plan.slot_to_row[slot];
  return row >= 0 && row < plan.num_rows ? row : -1;
}

// The slot of a row, or -1: none.
__device__ __forceinline__ int64_t slot_of(const PlanView& plan, int64_t row) {
  const int64_t slot = plan.row_to_slot[row];
  return slot >= 0 && slot < num_slots(plan) ? slot : -1;
}

// slot / top_k. A 64-bit division is ten times a 32-bit one, and slots are 32-bit.
__device__ __forceinline__ int64_t token_of(const PlanView& plan, int64_t slot) {
  return static_cast<uint32_t>(slot) / static_cast<uint32_t>(plan.top_k);
}

}  // namespace moe::cuda
