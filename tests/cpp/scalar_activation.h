// The activations in double, written as in the contract, with derivatives by central differences.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "moe/activation.h"

namespace moe::test {

inline double activate(const ActivationOptions& o, double gate, double up) {
  const auto sigmoid = [](double x) { return 1 / (1 + std::exp(-x)); };
  const auto gelu = [](double x) { return 0.5 * x * (1 + std::erf(x / std::sqrt(2.0))); };
  const auto gelu_tanh = [](double x) {
    return 0.5 * x * (1 + std::tanh(std::sqrt(2 / std::acos(-1.0)) * (x + 0.044715 * x * x * x)));
  };
  switch (o.activation) {
    case Activation::kSwiGLU:
      gate = std::min(gate, o.limit);
      up = std::clamp(up, -o.limit, o.limit);
      return gate * sigmoid(o.alpha * gate) * (up + o.up_offset);
    case Activation::kGeGLU:
      return gelu(gate) * up;
    case Activation::kGeGLUTanh:
      return gelu_tanh(gate) * up;
    case Activation::kReGLU:
      return std::max(gate, 0.0) * up;
    case Activation::kSiLU:
      return gate * sigmoid(gate);
    case Activation::kGELU:
      return gelu(gate);
    case Activation::kGELUTanh:
      return gelu_tanh(gate);
    case Activation::kReLU:
      return std::max(gate, 0.0);
    case Activation::kReLU2:
      return std::max(gate, 0.0) * std::max(gate, 0.0);
  }
  return NAN;
}

// Places of gate and up value of output column j in a row of the pre-activation.
inline std::pair<int64_t, int64_t> places(const ActivationOptions& o, int64_t j, int64_t intermediate_size) {
  if (!is_gated(o.activation)) return {j, j};
  if (o.gate_layout == GateLayout::kInterleaved) return {2 * j, 2 * j + 1};
  return {j, intermediate_size + j};
}

constexpr Activation kActivations[] = {Activation::kSwiGLU,   Activation::kGeGLU, Activation::kGeGLUTanh,
                                       Activation::kReGLU,    Activation::kSiLU,  Activation::kGELU,
                                       Activation::kGELUTanh, Activation::kReLU,  Activation::kReLU2};

// Every activation in every gate layout, and swiglu as gpt-oss has it.
inline std::vector<ActivationOptions> all_activations() {
  std::vector<ActivationOptions> all;
  for (const Activation activation : kActivations) {
    all.push_back({activation, GateLayout::kConcat, 1, INFINITY, 0});
    if (is_gated(activation)) all.push_back({activation, GateLayout::kInterleaved, 1, INFINITY, 0});
  }
  all.push_back({Activation::kSwiGLU, GateLayout::kInterleaved, 1.702, 0.7, 1});
  return all;
}

}  // namespace moe::test
