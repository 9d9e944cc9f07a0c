// activation: the nonlinearity between the two GEMMs.
//
// With sig = sigmoid, a gated pre-activation holds a gate g and an up value u per output column:
//   swiglu      g sig(alpha g) (u + up_offset), after g <- min(g, limit), u <- clamp(u, -limit, limit) when there is a
//   limit geglu       g Phi(g) u (Phi by erf);   geglu_tanh: gelu by tanh;   reglu: max(g, 0) u
// Not gated: silu, gelu, gelu_tanh, relu, relu2 = max(h, 0)^2.
// Gate layout: concat [g_0 .. g_I-1, u_0 .. u_I-1], interleaved [g_0, u_0, g_1, u_1, ..].
// gpt-oss is swiglu with alpha = 1.702, limit = 7, up_offset = 1, interleaved. The gradient is zero outside the clamp.
// References: arXiv 2002.05202 (GLU variants), 1606.08415 (GELU), 2109.08668 (squared ReLU).
#pragma once

#include "moe/cuda.h"

namespace moe {

enum class Activation : int8_t { kSwiGLU, kGeGLU, kGeGLUTanh, kReGLU, kSiLU, kGELU, kGELUTanh, kReLU, kReLU2 };
enum class GateLayout : int8_t { kConcat, kInterleaved };

constexpr bool is_gated(Activation activation) { return activation <= Activation::kReGLU; }

struct ActivationOptions {
  Activation activation;
  GateLayout gate_layout;  // ignored unless gated
  double alpha;            // swiglu only: 1 is the usual
  double limit;            // swiglu only: infinity is no limit
  double up_offset;        // swiglu only: 0 is the usual
};

// Columns of the pre-activation: 2I when gated, else I.
constexpr int64_t pre_activation_size(Activation activation, int64_t intermediate_size) {
  return is_gated(activation) ? 2 * intermediate_size : intermediate_size;
}

struct ActivationArgs {
  void* output;                // [R, I] dtype
  const void* pre_activation;  // [R, 2I] or [R, I] dtype
  int64_t num_rows, intermediate_size;
  DType dtype;
  ActivationOptions options;
};

struct ActivationBackwardArgs {
  void* grad_pre_activation;   // [R, 2I] or [R, I] dtype
  const void* grad_output;     // [R, I] dtype
  const void* pre_activation;  // [R, 2I] or [R, I] dtype
  int64_t num_rows, intermediate_size;
  DType dtype;
  ActivationOptions options;
};

Status activation_cpu(const ActivationArgs& args, const ThreadPool& pool);
Status activation_cuda(const ActivationArgs& args, const CudaContext& cuda);
Status activation_backward_cpu(const ActivationBackwardArgs& args, const ThreadPool& pool);
Status activation_backward_cuda(const ActivationBackwardArgs& args, const CudaContext& cuda);

}  // namespace moe
