// Tensors to GroupedGemmArgs, GroupedGemmWgradArgs and GroupedGemmBgradArgs.
#pragma once

#include <optional>

#include "moe/grouped_gemm.h"
#include "ops/plan.h"

namespace moe {

inline WeightLayout parse_weight_layout(const Op& op, const std::string& text) {
  return op.parse<WeightLayout>("weight_layout", text,
                                {{"out_in", WeightLayout::kOutIn}, {"in_out", WeightLayout::kInOut}});
}

template <typename Device>
Tensor grouped_gemm(const Tensor& rows, const Tensor& weight, const Tensor& expert_offsets,
                    const std::optional<Tensor>& bias, const std::string& weight_layout) {
  const Op op("grouped_gemm", rows);
  const WeightLayout layout = parse_weight_layout(op, weight_layout);
  const bool out_in = layout == WeightLayout::kOutIn;
  const Argument input = op.argument("rows", rows).rank(2, "[num_rows, k]").floating();
  const DType dtype = input.dtype();
  const Argument offsets = check_offsets(op, expert_offsets);
  const std::string_view legend = out_in ? "[num_experts, n, k]" : "[num_experts, k, n]";
  const Argument matrix = op.argument("weight", weight).rank(3, legend).type(scalar_type(dtype));
  const int64_t num_experts = offsets.size(0) - 1, k = input.size(1), n = matrix.size(out_in ? 1 : 2);
  if (out_in) {
    matrix.shape({num_experts, n, k}, legend);
  } else {
    matrix.shape({num_experts, k, n}, legend);
  }
  std::optional<Argument> added;
  if (bias) added = op.argument("bias", *bias).shape({num_experts, n}, "[num_experts, n]").type(scalar_type(dtype));
  Tensor output = op.empty({input.size(0), n}, scalar_type(dtype));
  op.run<Device>(GroupedGemmArgs{.output = output.mutable_data_ptr(),
                                 .rows = input.data(),
                                 .weight = matrix.data(),
                                 .bias = added ? added->data() : nullptr,
                                 .expert_offsets = offsets.data<int32_t>(),
                                 .num_rows = input.size(0),
                                 .num_experts = num_experts,
                                 .n = n,
                                 .k = k,
                                 .weight_layout = layout,
                                 .dtype = dtype});
  return output;
}

// `existing`: the gradient to add to, or none.
template <typename Device>
Tensor wgrad(const Op& op, const Tensor& lhs, const Tensor& rhs, const Tensor& expert_offsets, const Tensor* existing) {
  const Argument left = op.argument("lhs", lhs).rank(2, "[num_rows, m]").floating();
  const Argument right = op.argument("rhs", rhs).rank(2, "[num_rows, n]").type(scalar_type(left.dtype()));
  right.shape({left.size(0), right.size(1)}, "[num_rows, n], with the num_rows of lhs");
  const Argument offsets = check_offsets(op, expert_offsets);
  const int64_t num_experts = offsets.size(0) - 1, m = left.size(1), n = right.size(1);
  const ScalarType type = scalar_type(left.dtype());
  Tensor output = existing ? *existing : op.empty_kept({num_experts, m, n}, type);
  op.run<Device>(GroupedGemmWgradArgs{
      .output = op.output("grad", output).shape({num_experts, m, n}, "[num_experts, m, n]").type(type).mutable_data(),
      .lhs = left.data(),
      .rhs = right.data(),
      .expert_offsets = offsets.data<int32_t>(),
      .num_rows = left.size(0),
      .num_experts = num_experts,
      .m = m,
      .n = n,
      .dtype = left.dtype(),
      .accumulate = existing != nullptr});
  return output;
}

template <typename Device>
Tensor grouped_gemm_wgrad(const Tensor& lhs, const Tensor& rhs, const Tensor& expert_offsets) {
  return wgrad<Device>(Op("grouped_gemm_wgrad", lhs), lhs, rhs, expert_offsets, nullptr);
}

template <typename Device>
void grouped_gemm_wgrad_(const Tensor& grad, const Tensor& lhs, const Tensor& rhs, const Tensor& expert_offsets) {
  wgrad<Device>(Op("grouped_gemm_wgrad_", lhs), lhs, rhs, expert_offsets, &grad);
}

template <typename Device>
Tensor grouped_gemm_bgrad(const Tensor& grad_output, const Tensor& expert_offsets) {
  const Op op("grouped_gemm_bgrad", grad_output);
  const Argument grad = op.argument("grad_output", grad_output).rank(2, "[num_rows, n]").floating();
  const Argument offsets = check_offsets(op, expert_offsets);
  const int64_t num_experts = offsets.size(0) - 1, n = grad.size(1);
  Tensor output = op.empty({num_experts, n}, scalar_type(grad.dtype()));
  op.run<Device>(GroupedGemmBgradArgs{.output = output.mutable_data_ptr(),
                                      .grad_output = grad.data(),
                                      .expert_offsets = offsets.data<int32_t>(),
                                      .num_rows = grad.size(0),
                                      .num_experts = num_experts,
                                      .n = n,
                                      .dtype = grad.dtype()});
  return output;
}

}  // namespace moe
