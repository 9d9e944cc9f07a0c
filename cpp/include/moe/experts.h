// experts: permute -> grouped_gemm -> activation -> grouped_gemm -> combine as one operator.
//
// Forward, for row r of expert e, of token t(r) and weight s_r:
//   H_r = W1_e X_t(r) + b1_e     A_r = act(H_r)     Y_r = W2_e A_r + b2_e     O_t = sum over its rows of s_r Y_r
// X is gathered while the GEMM loads it. H is written only when it is asked for; Y is never stored as a whole.
//
// Backward, from X, H, s and the plan alone, with dO_r = dO_t(r) gathered while it is loaded:
//   P_r = W2_e^T dO_r      ds_r = <P_r, act(H_r)> + <dO_r, b2_e>      dH_r = d act(s_r P_r, H_r)      A'_r = s_r
//   act(H_r) dW2_e = sum dO_r A'_r^T     dW1_e = sum dH_r X_t(r)^T     dX_t = sum over its rows of W1_e^T dH_r db1_e =
//   sum dH_r            db2_e = sum s_r dO_r
// Without a saved H the backward computes it again. References: arXiv 2512.14080 (what has to be saved).
#pragma once

#include "moe/activation.h"
#include "moe/grouped_gemm.h"
#include "moe/plan.h"

namespace moe {

// The layer's parameters, sizes and options: the same forward and backward. P is 2I when gated, else I.
struct ExpertsLayer {
  const void* hidden_states;  // [T, H] dtype
  const void* gate_up_proj;   // [E, P, H] out_in or [E, H, P] in_out, dtype
  const void* down_proj;      // [E, H, I] out_in or [E, I, H] in_out, dtype
  const void* gate_up_bias;   // [E, P] dtype, or null
  const void* down_bias;      // [E, H] dtype, or null
  const void* topk_weights;   // [T, K] fp32 (fp64 for fp64)
  PlanView plan;
  int64_t hidden_size, intermediate_size;
  DType dtype;
  WeightLayout weight_layout;
  ActivationOptions activation;
  // What a row gives does not depend on how many other rows its expert has: parts of a batch then give the bits of the
  // whole. Otherwise few rows may be computed in another order of summation, which is faster.
  bool row_invariant = false;
};

struct ExpertsArgs {
  void* output;          // [T, H] dtype
  void* pre_activation;  // [R, P] dtype, or null when it is not to be saved
  ExpertsLayer layer;
};

// plan, and experts by it. On a GPU few slots are computed by kernels that make the plan for themselves: its arrays are
// then left as they are.
struct RoutedExpertsArgs {
  PlanArgs plan;
  ExpertsArgs experts;  // with the plan that `plan` writes
};

// A gradient pointer that is null is not computed.
struct ExpertsBackwardArgs {
  void* grad_hidden_states;    // [T, H] dtype
  void* grad_gate_up_proj;     // as gate_up_proj
  void* grad_down_proj;        // as down_proj
  void* grad_gate_up_bias;     // [E, P] dtype
  void* grad_down_bias;        // [E, H] dtype
  void* grad_topk_weights;     // [T, K] fp32 (fp64 for fp64)
  const void* grad_output;     // [T, H] dtype
  const void* pre_activation;  // [R, P] dtype, or null: computed again
  ExpertsLayer layer;
  bool accumulate = false;  // the gradients of the two projections are added to what is there
};

Status experts_cpu(const ExpertsArgs& args, const ThreadPool& pool);
Status experts_cuda(const ExpertsArgs& args, const CudaContext& cuda);
Status routed_experts_cpu(const RoutedExpertsArgs& args, const ThreadPool& pool);
Status routed_experts_cuda(const RoutedExpertsArgs& args, const CudaContext& cuda);
Status experts_backward_cpu(const ExpertsBackwardArgs& args, const ThreadPool& pool);
Status experts_backward_cuda(const ExpertsBackwardArgs& args, const CudaContext& cuda);

}  // namespace moe
