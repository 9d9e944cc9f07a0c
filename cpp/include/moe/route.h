// route: which experts, with what weight?
//
// With z = router_logits[t] (arithmetic in fp32, in fp64 for fp64 logits):
//   v = softmax(z) or sigmoid(z)
//   c = z                            when there is neither an expert_bias nor groups (v is monotonic in z, and z has no
//   ties by saturation)
//     = v + expert_bias              score_then_topk
//     = z + expert_bias              topk_then_score
//   groups: E is cut into num_groups equal runs; a group's score is the sum of its two largest c; only the topk_groups
//           best groups (ties to the lower group) stay eligible.
//   ids = the K largest c, descending, ties to the lower expert id. NaN counts as -infinity, so ids are always K
//         distinct experts, and NaN shows in the weights.
//   w = v[ids]                       score_then_topk
//     = softmax(z[ids]) or sigmoid(z[ids])   topk_then_score
//   renormalize: w /= (sum(w) + kRenormalizeEps);   then w *= routed_scaling_factor.
// The bias steers the selection only; it never enters the weight and gets no gradient.
//
// route_backward: with g = grad_topk_weights * routed_scaling_factor and s the weights before scaling,
//   renormalize (s = w / S):  g <- (g - <g, s>) / S
//   softmax over all:   dz = v * (g^ - <g^, v>), g^ zero off the selection
//   softmax over top-k: dz_j = w_j (g_j - <g, w>) on the selection, 0 elsewhere
//   sigmoid:            dz_j = g_j v_j (1 - v_j) on the selection, 0 elsewhere
// References: arXiv 2101.03961 (Switch), 2401.04088 (Mixtral), 2412.19437 (DeepSeek-V3: sigmoid, bias, groups).
#pragma once

#include "moe/types.h"

namespace moe {

inline constexpr double kRenormalizeEps = 1e-20;

enum class ScoreFunction : int8_t { kSoftmax, kSigmoid };
enum class ScoreOrder : int8_t { kScoreThenTopK, kTopKThenScore };

struct RouteOptions {
  ScoreFunction score_function;
  ScoreOrder score_order;
  bool renormalize;
  double routed_scaling_factor;
  int64_t num_groups;
  int64_t topk_groups;
  bool check_finite;  // return kNonFiniteLogits if any logit is NaN or infinite
};

struct RouteArgs {
  void* topk_weights;         // [T, K] fp32 (fp64 for fp64 logits)
  int32_t* topk_ids;          // [T, K]
  const void* router_logits;  // [T, E] dtype
  const void* expert_bias;    // [E] fp32 (fp64 for fp64 logits), or null
  int64_t num_tokens, num_experts, top_k;
  DType dtype;
  RouteOptions options;
};

struct RouteBackwardArgs {
  void* grad_router_logits;       // [T, E] dtype
  const void* grad_topk_weights;  // [T, K] fp32 (fp64 for fp64 logits)
  const void* router_logits;      // [T, E] dtype
  const int32_t* topk_ids;        // [T, K]; ids outside [0, E) are ignored
  int64_t num_tokens, num_experts, top_k;
  DType dtype;
  RouteOptions options;
};

Status route_cpu(const RouteArgs& args, const ThreadPool& pool);
Status route_backward_cpu(const RouteBackwardArgs& args, const ThreadPool& pool);

}  // namespace moe
