// Tensors to ExpertsArgs and ExpertsBackwardArgs.
#pragma once

#include <optional>
#include <tuple>

#include "moe/experts.h"
#include "ops/activation.h"
#include "ops/combine.h"
#include "ops/grouped_gemm.h"

namespace moe {

// The checked tensors and options that forward and backward share.
struct ExpertsTensors {
  PlanView plan;
  ActivationOptions activation;
  WeightLayout weight_layout;
  bool row_invariant;
  Argument hidden_states, gate_up_proj, down_proj, topk_weights;
  std::optional<Argument> gate_up_bias, down_bias;
  int64_t hidden_size, intermediate_size, pre_activation_size;

  ExpertsTensors(const Op& op, const PlanView& the_plan, const ActivationOptions& options, WeightLayout layout,
                 bool by_row, const Tensor& tokens, const Tensor& w1, const Tensor& w2, const Tensor& weights,
                 const std::optional<Tensor>& b1, const std::optional<Tensor>& b2)
      : plan(the_plan),
        activation(options),
        weight_layout(layout),
        row_invariant(by_row),
        hidden_states(op.argument("hidden_states", tokens).rank(2, "[num_tokens, hidden_size]").floating()),
        gate_up_proj(op.argument("gate_up_proj", w1).rank(3, gate_up_legend()).type(type())),
        down_proj(op.argument("down_proj", w2).rank(3, down_legend()).type(type())),
        topk_weights(check_topk_weights(op, weights, plan, dtype())),
        hidden_size(hidden_states.size(1)),
        intermediate_size(down_proj.size(out_in() ? 2 : 1)),
        pre_activation_size(moe::pre_activation_size(options.activation, intermediate_size)) {
    const int64_t num_experts = plan.num_experts, h = hidden_size, i = intermediate_size, p = pre_activation_size;
    hidden_states.shape({plan.num_tokens, h}, "[num_tokens, hidden_size], with the plan's num_tokens");
    if (out_in()) {
      down_proj.shape({num_experts, h, i}, down_legend());
      gate_up_proj.shape({num_experts, p, h}, gate_up_legend());
    } else {
      down_proj.shape({num_experts, i, h}, down_legend());
      gate_up_proj.shape({num_experts, h, p}, gate_up_legend());
    }
    if (b1) gate_up_bias = op.argument("gate_up_bias", *b1).shape({num_experts, p}, gate_up_bias_legend()).type(type());
    if (b2)
      down_bias = op.argument("down_bias", *b2).shape({num_experts, h}, "[num_experts, hidden_size]").type(type());
  }

  bool out_in() const { return weight_layout == WeightLayout::kOutIn; }
  DType dtype() const { return hidden_states.dtype(); }
  ScalarType type() const { return scalar_type(dtype()); }
  ExpertsLayer layer() const {
    return {.hidden_states = hidden_states.data(),
            .gate_up_proj = gate_up_proj.data(),
            .down_proj = down_proj.data(),
            .gate_up_bias = gate_up_bias ? gate_up_bias->data() : nullptr,
            .down_bias = down_bias ? down_bias->data() : nullptr,
            .topk_weights = topk_weights.data(),
            .plan = plan,
            .hidden_size = hidden_size,
            .intermediate_size = intermediate_size,
            .dtype = dtype(),
            .weight_layout = weight_layout,
            .activation = activation,
            .row_invariant = row_invariant};
  }

 private:
  std::string_view gate_up_legend() const {
    if (is_gated(activation.activation)) {
      return out_in() ? "[num_experts, 2 * intermediate_size, hidden_size]"
                      : "[num_experts, hidden_size, 2 * intermediate_size]";
    }
    return out_in() ? "[num_experts, intermediate_size, hidden_size]" : "[num_experts, hidden_size, intermediate_size]";
  }
  std::string_view gate_up_bias_legend() const {
    return is_gated(activation.activation) ? "[num_experts, 2 * intermediate_size]"
                                           : "[num_experts, intermediate_size]";
  }
  std::string_view down_legend() const {
    return out_in() ? "[num_experts, hidden_size, intermediate_size]" : "[num_experts, intermediate_size, hidden_size]";
  }
};

template <typename Device>
std::tuple<Tensor, Tensor> experts(const Tensor& hidden_states, const Tensor& gate_up_proj, const Tensor& down_proj,
                                   const Tensor& topk_weights, const Tensor& expert_offsets, const Tensor& row_to_slot,
                                   const Tensor& slot_to_row, const std::optional<Tensor>& gate_up_bias,
                                   const std::optional<Tensor>& down_bias, const std::string& activation,
                                   const std::string& gate_layout, const std::string& weight_layout, double alpha,
                                   std::optional<double> limit, double up_offset, bool row_invariant,
                                   bool save_pre_activation, bool /*accumulate, for the backward*/) {
  const Op op("experts", hidden_states);
  const PlanTensors plan(op, expert_offsets, row_to_slot, slot_to_row);
  const ExpertsTensors tensors(op, plan.view(), parse_activation(op, activation, gate_layout, alpha, limit, up_offset),
                               parse_weight_layout(op, weight_layout), row_invariant, hidden_states, gate_up_proj,
                               down_proj, topk_weights, gate_up_bias, down_bias);
  Tensor output = op.empty({plan.num_tokens(), tensors.hidden_size}, tensors.type());
  Tensor pre_activation =
      op.empty_kept({save_pre_activation ? plan.num_rows() : 0, tensors.pre_activation_size}, tensors.type());
  op.run<Device>(ExpertsArgs{.output = output.mutable_data_ptr(),
                             .pre_activation = save_pre_activation ? pre_activation.mutable_data_ptr() : nullptr,
                             .layer = tensors.layer()});
  return {output, pre_activation};
}

// plan, and experts without what a backward would need.
template <typename Device>
Tensor routed_experts(const Tensor& hidden_states, const Tensor& gate_up_proj, const Tensor& down_proj,
                      const Tensor& topk_weights, const Tensor& topk_ids, const std::optional<Tensor>& gate_up_bias,
                      const std::optional<Tensor>& down_bias, const std::string& activation,
                      const std::string& gate_layout, const std::string& weight_layout, double alpha,
                      std::optional<double> limit, double up_offset, bool row_invariant) {
  const Op op("routed_experts", hidden_states);
  const int64_t num_experts = op.argument("gate_up_proj", gate_up_proj).rank(3, "[num_experts, ..]").size(0);
  const InnerPlan plan(op, topk_ids, num_experts);
  const ExpertsTensors tensors(op, plan.view(), parse_activation(op, activation, gate_layout, alpha, limit, up_offset),
                               parse_weight_layout(op, weight_layout), row_invariant, hidden_states, gate_up_proj,
                               down_proj, topk_weights, gate_up_bias, down_bias);
  Tensor output = op.empty({tensors.plan.num_tokens, tensors.hidden_size}, tensors.type());
  op.run<Device>(RoutedExpertsArgs{
      .plan = plan.args(),
      .experts = {.output = output.mutable_data_ptr(), .pre_activation = nullptr, .layer = tensors.layer()}});
  return output;
}

// Which gradients are wanted, and for those of the two projections where to add them, if not to new tensors.
struct WantedGradients {
  bool hidden_states, projections, topk_weights, biases;
  const Tensor *gate_up_proj = nullptr, *down_proj = nullptr;
};

// In order: of hidden_states, gate_up_proj, down_proj, topk_weights, gate_up_bias, down_bias.
using ExpertsGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <typename Device>
ExpertsGradients experts_gradients(const Op& op, const WantedGradients& wanted, const Tensor& grad_output,
                                   const Tensor& hidden_states, const Tensor& pre_activation,
                                   const Tensor& gate_up_proj, const Tensor& down_proj, const Tensor& topk_weights,
                                   const Tensor& expert_offsets, const Tensor& row_to_slot, const Tensor& slot_to_row,
                                   const std::optional<Tensor>& gate_up_bias, const std::optional<Tensor>& down_bias,
                                   const std::string& activation, const std::string& gate_layout,
                                   const std::string& weight_layout, double alpha, std::optional<double> limit,
                                   double up_offset, bool row_invariant) {
  const PlanTensors plan(op, expert_offsets, row_to_slot, slot_to_row);
  const ExpertsTensors tensors(op, plan.view(), parse_activation(op, activation, gate_layout, alpha, limit, up_offset),
                               parse_weight_layout(op, weight_layout), row_invariant, hidden_states, gate_up_proj,
                               down_proj, topk_weights, gate_up_bias, down_bias);
  const Argument grad = op.argument("grad_output", grad_output)
                            .shape({plan.num_tokens(), tensors.hidden_size}, "[num_tokens, hidden_size]")
                            .type(tensors.type());
  const Argument saved = op.argument("pre_activation", pre_activation).rank(2, "[num_rows, p]").type(tensors.type());
  const bool recompute = saved.size(0) == 0;
  saved.shape({recompute ? 0 : plan.num_rows(), tensors.pre_activation_size}, is_gated(tensors.activation.activation)
                                                                                  ? "[num_rows, 2 * intermediate_size]"
                                                                                  : "[num_rows, intermediate_size]");

  struct Gradient {
    Tensor tensor;
    void* data;
  };
  const auto existing = [&](std::string_view name, const Tensor& tensor, std::initializer_list<int64_t> shape) {
    const Argument argument = op.output(name, tensor);
    argument.shape(shape, "that of the parameter").type(tensors.type());
    return Gradient{tensor, argument.mutable_data()};
  };
  const auto allocate = [&](bool needed, std::initializer_list<int64_t> shape, ScalarType type) {
    Tensor tensor = needed ? op.empty_kept(shape, type) : op.empty({0}, type);
    return Gradient{tensor, needed ? tensor.mutable_data_ptr() : nullptr};
  };
  const ScalarType type = tensors.type();
  const int64_t num_experts = plan.num_experts(), h = tensors.hidden_size, i = tensors.intermediate_size,
                p = tensors.pre_activation_size;
  const bool out_in = tensors.out_in();
  const Gradient tokens = allocate(wanted.hidden_states, {plan.num_tokens(), h}, type);
  const auto projection = [&](std::string_view name, const Tensor* given, std::initializer_list<int64_t> shape) {
    return given ? existing(name, *given, shape) : allocate(wanted.projections, shape, type);
  };
  const Gradient gate_up =
      projection("grad_gate_up_proj", wanted.gate_up_proj, {num_experts, out_in ? p : h, out_in ? h : p});
  const Gradient down = projection("grad_down_proj", wanted.down_proj, {num_experts, out_in ? h : i, out_in ? i : h});
  const Gradient weights =
      allocate(wanted.topk_weights, {plan.num_tokens(), plan.top_k()}, weight_type(tensors.dtype()));
  const Gradient bias1 = allocate(wanted.biases && gate_up_bias, {num_experts, p}, type);
  const Gradient bias2 = allocate(wanted.biases && down_bias, {num_experts, h}, type);
  op.run<Device>(ExpertsBackwardArgs{.grad_hidden_states = tokens.data,
                                     .grad_gate_up_proj = gate_up.data,
                                     .grad_down_proj = down.data,
                                     .grad_gate_up_bias = bias1.data,
                                     .grad_down_bias = bias2.data,
                                     .grad_topk_weights = weights.data,
                                     .grad_output = grad.data(),
                                     .pre_activation = recompute ? nullptr : saved.data(),
                                     .layer = tensors.layer(),
                                     .accumulate = wanted.gate_up_proj != nullptr});
  return {tokens.tensor, gate_up.tensor, down.tensor, weights.tensor, bias1.tensor, bias2.tensor};
}

template <typename Device>
ExpertsGradients experts_backward(const Tensor& grad_output, const Tensor& hidden_states, const Tensor& pre_activation,
                                  const Tensor& gate_up_proj, const Tensor& down_proj, const Tensor& topk_weights,
                                  const Tensor& expert_offsets, const Tensor& row_to_slot, const Tensor& slot_to_row,
                                  const std::optional<Tensor>& gate_up_bias, const std::optional<Tensor>& down_bias,
                                  const std::string& activation, const std::string& gate_layout,
                                  const std::string& weight_layout, double alpha, std::optional<double> limit,
                                  double up_offset, bool row_invariant, bool needs_hidden_states,
                                  bool needs_projections, bool needs_topk_weights, bool needs_biases) {
  const WantedGradients wanted{needs_hidden_states, needs_projections, needs_topk_weights, needs_biases};
  return experts_gradients<Device>(Op("experts_backward", hidden_states), wanted, grad_output, hidden_states,
                                   pre_activation, gate_up_proj, down_proj, topk_weights, expert_offsets, row_to_slot,
                                   slot_to_row, gate_up_bias, down_bias, activation, gate_layout, weight_layout, alpha,
                                   limit, up_offset, row_invariant);
}

template <typename Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> experts_backward_(
    const Tensor& grad_gate_up_proj, const Tensor& grad_down_proj, const Tensor& grad_output,
    const Tensor& hidden_states, const Tensor& pre_activation, const Tensor& gate_up_proj, const Tensor& down_proj,
    const Tensor& topk_weights, const Tensor& expert_offsets, const Tensor& row_to_slot, const Tensor& slot_to_row,
    const std::optional<Tensor>& gate_up_bias, const std::optional<Tensor>& down_bias, const std::string& activation,
    const std::string& gate_layout, const std::string& weight_layout, double alpha, std::optional<double> limit,
    double up_offset, bool row_invariant, bool needs_hidden_states, bool needs_topk_weights, bool needs_biases) {
  const WantedGradients wanted{needs_hidden_states, true,           needs_topk_weights, needs_biases,
                               &grad_gate_up_proj,  &grad_down_proj};
  const auto [tokens, gate_up, down, weights, bias1, bias2] = experts_gradients<Device>(
      Op("experts_backward_", hidden_states), wanted, grad_output, hidden_states, pre_activation, gate_up_proj,
      down_proj, topk_weights, expert_offsets, row_to_slot, slot_to_row, gate_up_bias, down_bias, activation,
      gate_layout, weight_layout, alpha, limit, up_offset, row_invariant);
  return {tokens, weights, bias1, bias2};
}

}  // namespace moe
