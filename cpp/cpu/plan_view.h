// Reading a plan that may come from a user: whatever it holds, nothing out of bounds is read or written.
#pragma once

#include <algorithm>

#include "moe/plan.h"

namespace moe {

inline int64_t num_slots(const PlanView& plan) { return plan.num_tokens * plan.top_k; }

// The row of a slot, or -1: dropped.
inline int64_t row_of(const PlanView& plan, int64_t slot) {
  const int64_t row = plan.slot_to_row[slot];
  return row >= 0 && row < plan.num_rows ? row : -1;
}

// The slot of a row, or -1: none.
inline int64_t slot_of(const PlanView& plan, int64_t row) {
  const int64_t slot = plan.row_to_slot[row];
  return slot >= 0 && slot < num_slots(plan) ? slot : -1;
}

// Writes offsets [E + 1] with 0 <= offsets[0] <= .. <= offsets[E] <= rows: each clamped to [previous, rows].
inline void sanitize_offsets(const int32_t* expert_offsets, int64_t num_experts, int64_t rows, int64_t* offsets) {
  int64_t previous = 0;
  for (int64_t e = 0; e <= num_experts; ++e) {
    previous = std::clamp<int64_t>(expert_offsets[e], previous, rows);
    offsets[e] = previous;
  }
}

}  // namespace moe
