// Tensors to ActivationArgs and ActivationBackwardArgs.
#pragma once

#include <cmath>
#include <limits>
#include <optional>

#include "checks.h"
#include "moe/activation.h"

namespace moe {

inline ActivationOptions parse_activation(const Op& op, const std::string& activation, const std::string& gate_layout,
                                          double alpha, std::optional<double> limit, double up_offset) {
  const ActivationOptions options{
      .activation = op.parse<Activation>("activation", activation,
                                         {{"swiglu", Activation::kSwiGLU},
                                          {"geglu", Activation::kGeGLU},
                                          {"geglu_tanh", Activation::kGeGLUTanh},
                                          {"reglu", Activation::kReGLU},
                                          {"silu", Activation::kSiLU},
                                          {"gelu", Activation::kGELU},
                                          {"gelu_tanh", Activation::kGELUTanh},
                                          {"relu", Activation::kReLU},
                                          {"relu2", Activation::kReLU2}}),
      .gate_layout = op.parse<GateLayout>("gate_layout", gate_layout,
                                          {{"concat", GateLayout::kConcat}, {"interleaved", GateLayout::kInterleaved}}),
      .alpha = alpha,
      .limit = limit.value_or(std::numeric_limits<double>::infinity()),
      .up_offset = up_offset};
  if (!(options.limit > 0)) op.fail("limit", "be positive or None", std::to_string(options.limit));
  if (options.activation != Activation::kSwiGLU) {
    const auto refuse = [&](std::string_view name, double value) {
      op.fail(name, "be left out with activation '" + activation + "'", std::to_string(value), "it shapes swiglu only");
    };
    if (alpha != 1) refuse("alpha", alpha);
    if (limit) refuse("limit", *limit);
    if (up_offset != 0) refuse("up_offset", up_offset);
  }
  return options;
}

// Checks [R, 2I] or [R, I] and returns it with I.
inline std::pair<Argument, int64_t> check_pre_activation(const Op& op, const Tensor& tensor, Activation activation) {
  const bool gated = is_gated(activation);
  const Argument pre_activation =
      op.argument("pre_activation", tensor)
          .rank(2, gated ? "[num_rows, 2 * intermediate_size]" : "[num_rows, intermediate_size]")
          .floating();
  const int64_t width = pre_activation.size(1);
  if (gated && width % 2 != 0) {
    pre_activation.fail("have an even number of columns, a gate and an up value per output column",
                        std::to_string(width));
  }
  return {pre_activation, gated ? width / 2 : width};
}

template <typename Device>
Tensor activation(const Tensor& pre_activation, const std::string& activation, const std::string& gate_layout,
                  double alpha, std::optional<double> limit, double up_offset) {
  const Op op("activation", pre_activation);
  const ActivationOptions options = parse_activation(op, activation, gate_layout, alpha, limit, up_offset);
  const auto [input, intermediate_size] = check_pre_activation(op, pre_activation, options.activation);
  Tensor output = op.empty({input.size(0), intermediate_size}, scalar_type(input.dtype()));
  op.run<Device>(ActivationArgs{.output = output.mutable_data_ptr(),
                                .pre_activation = input.data(),
                                .num_rows = input.size(0),
                                .intermediate_size = intermediate_size,
                                .dtype = input.dtype(),
                                .options = options});
  return output;
}

template <typename Device>
Tensor activation_backward(const Tensor& grad_output, const Tensor& pre_activation, const std::string& activation,
                           const std::string& gate_layout, double alpha, std::optional<double> limit,
                           double up_offset) {
  const Op op("activation_backward", pre_activation);
  const ActivationOptions options = parse_activation(op, activation, gate_layout, alpha, limit, up_offset);
  const auto [input, intermediate_size] = check_pre_activation(op, pre_activation, options.activation);
  const Argument grad = op.argument("grad_output", grad_output)
                            .shape({input.size(0), intermediate_size}, "[num_rows, intermediate_size]")
                            .type(scalar_type(input.dtype()));
  Tensor grad_pre_activation = op.empty({input.size(0), input.size(1)}, scalar_type(input.dtype()));
  op.run<Device>(ActivationBackwardArgs{.grad_pre_activation = grad_pre_activation.mutable_data_ptr(),
                                        .grad_output = grad.data(),
                                        .pre_activation = input.data(),
                                        .num_rows = input.size(0),
                                        .intermediate_size = intermediate_size,
                                        .dtype = input.dtype(),
                                        .options = options});
  return grad_pre_activation;
}

}  // namespace moe
