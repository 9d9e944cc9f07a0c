// Tensors to CombineArgs and CombineBackwardArgs.
#pragma once

#include <optional>
#include <tuple>

#include "moe/combine.h"
#include "ops/plan.h"

namespace moe {

// Checks [R, H] rows and returns them.
inline Argument check_rows(const Op& op, const Tensor& rows, const PlanTensors& plan) {
  const Argument checked = op.argument("rows", rows).rank(2, "[num_rows, hidden_size]").floating();
  return checked.shape({plan.num_rows(), checked.size(1)}, "[num_rows, hidden_size], with the plan's num_rows");
}

inline Argument check_topk_weights(const Op& op, const Tensor& topk_weights, const PlanView& plan, DType dtype) {
  return op.argument("topk_weights", topk_weights)
      .shape({plan.num_tokens, plan.top_k}, "[num_tokens, top_k]")
      .type(weight_type(dtype));
}

template <typename Device>
Tensor combine(const Tensor& rows, const std::optional<Tensor>& topk_weights, const Tensor& expert_offsets,
               const Tensor& row_to_slot, const Tensor& slot_to_row) {
  const Op op("combine", rows);
  const PlanTensors plan(op, expert_offsets, row_to_slot, slot_to_row);
  const Argument source = check_rows(op, rows, plan);
  std::optional<Argument> weights;
  if (topk_weights) weights = check_topk_weights(op, *topk_weights, plan.view(), source.dtype());
  Tensor output = op.empty({plan.num_tokens(), source.size(1)}, scalar_type(source.dtype()));
  op.run<Device>(CombineArgs{.output = output.mutable_data_ptr(),
                             .rows = source.data(),
                             .topk_weights = weights ? weights->data() : nullptr,
                             .plan = plan.view(),
                             .hidden_size = source.size(1),
                             .dtype = source.dtype()});
  return output;
}

template <typename Device>
std::tuple<Tensor, Tensor> combine_backward(const Tensor& grad_output, const Tensor& rows, const Tensor& topk_weights,
                                            const Tensor& expert_offsets, const Tensor& row_to_slot,
                                            const Tensor& slot_to_row) {
  const Op op("combine_backward", rows);
  const PlanTensors plan(op, expert_offsets, row_to_slot, slot_to_row);
  const Argument source = check_rows(op, rows, plan);
  const DType dtype = source.dtype();
  const int64_t hidden_size = source.size(1);
  const Argument grad = op.argument("grad_output", grad_output)
                            .shape({plan.num_tokens(), hidden_size}, "[num_tokens, hidden_size]")
                            .type(scalar_type(dtype));
  const Argument weights = check_topk_weights(op, topk_weights, plan.view(), dtype);
  Tensor grad_rows = op.empty({plan.num_rows(), hidden_size}, scalar_type(dtype));
  Tensor grad_topk_weights = op.empty({plan.num_tokens(), plan.top_k()}, weight_type(dtype));
  op.run<Device>(CombineBackwardArgs{.grad_rows = grad_rows.mutable_data_ptr(),
                                     .grad_topk_weights = grad_topk_weights.mutable_data_ptr(),
                                     .grad_output = grad.data(),
                                     .rows = source.data(),
                                     .topk_weights = weights.data(),
                                     .plan = plan.view(),
                                     .hidden_size = hidden_size,
                                     .dtype = dtype});
  return {grad_rows, grad_topk_weights};
}

}  // namespace moe
