// Tensors to PermuteArgs.
#pragma once

#include "moe/permute.h"
#include "ops/plan.h"

namespace moe {

template <typename Device>
Tensor permute(const Tensor& hidden_states, const Tensor& expert_offsets, const Tensor& row_to_slot,
               const Tensor& slot_to_row) {
  const Op op("permute", hidden_states);
  const PlanTensors plan(op, expert_offsets, row_to_slot, slot_to_row);
  const Argument tokens = op.argument("hidden_states", hidden_states).rank(2, "[num_tokens, hidden_size]").floating();
  const int64_t hidden_size = tokens.size(1);
  tokens.shape({plan.num_tokens(), hidden_size}, "[num_tokens, hidden_size], with the plan's num_tokens");
  Tensor rows = op.empty({plan.num_rows(), hidden_size}, scalar_type(tokens.dtype()));
  op.run<Device>(PermuteArgs{.rows = rows.mutable_data_ptr(),
                             .hidden_states = tokens.data(),
                             .plan = plan.view(),
                             .hidden_size = hidden_size,
                             .dtype = tokens.dtype()});
  return rows;
}

}  // namespace moe
