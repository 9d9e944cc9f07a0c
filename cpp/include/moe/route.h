// route: which experts, with what weight?
//
// With z = router_logits[t] (arithmetic in fp32, in fp64 for fp64 logits):
//   v = softmax(z), sigmoid(z) or sqrt(softplus(z))
//   c = z                            when there is neither an expert_bias nor groups (v is monotonic in z, and z has no
//   ties by saturation)
//     = v + expert_bias              score_then_topk
//     = z + expert_bias              topk_then_score
//   groups: E is cut into num_groups equal runs; a group's score is the sum of its two largest c, or the largest; only
//           the topk_groups best groups (ties to the lower group) stay eligible. group_mask -inf: no other expert is
//           taken. group_mask zero: c of the others becomes 0, which beats a negative c.
//   ids = the K largest c, descending, ties to the lower expert id. NaN counts as -infinity, so ids are always K
//         distinct experts, and NaN shows in the weights.
//   ids = route_override             when it is given: nothing is selected; an id outside [0, E) weighs 0.
//   w = v[ids]                       score_then_topk
//     = the same function of z[ids] alone    topk_then_score
//   renormalize: w /= N, with N = (sum w^p)^(1/p) and eps added to it, or N = max(N, eps).
//   then w *= routed_scaling_factor.
// The bias steers the selection only; it never enters the weight and gets no gradient.
//
// route_backward: with g = grad_topk_weights * routed_scaling_factor and w the weights before renormalisation,
//   renormalize (M = (sum w^p)^(1/p)):  g_j <- g_j / N - <g, w> / N^2 * (w_j / M)^(p - 1); no second term where eps
//                                       clamps
//   softmax over all:   dz = v * (g^ - <g^, v>), g^ zero off the selection
//   softmax over top-k: dz_j = w_j (g_j - <g, w>) on the selection, 0 elsewhere
//   sigmoid:            dz_j = g_j v_j (1 - v_j) on the selection, 0 elsewhere
//   sqrt of softplus:   dz_j = g_j sigmoid(z_j) / (2 v_j) on the selection, 0 elsewhere
// References: arXiv 2101.03961 (Switch), 2401.04088 (Mixtral), 2405.04434 (DeepSeek-V2: groups), 2412.19437
// (DeepSeek-V3: sigmoid, bias).
#pragma once

#include "moe/cuda.h"

namespace moe {

enum class ScoreFunction : int8_t { kSoftmax, kSigmoid, kSqrtSoftplus };
enum class ScoreOrder : int8_t { kScoreThenTopK, kTopKThenScore };
enum class GroupScore : int8_t { kTop2Sum, kMax };
enum class GroupMask : int8_t { kNegativeInfinity, kZero };
enum class EpsMode : int8_t { kAdd, kClamp };

struct RouteOptions {
  ScoreFunction score_function = ScoreFunction::kSoftmax;
  ScoreOrder score_order = ScoreOrder::kScoreThenTopK;
  bool renormalize = true;
  double renormalize_p = 1;
  double renormalize_eps = 1e-20;
  EpsMode renormalize_eps_mode = EpsMode::kAdd;
  double routed_scaling_factor = 1;
  int64_t num_groups = 1;
  int64_t topk_groups = 1;
  GroupScore group_score = GroupScore::kTop2Sum;
  GroupMask group_mask = GroupMask::kNegativeInfinity;
  bool check_finite = false;  // return kNonFiniteLogits if any logit is NaN or infinite; on CUDA see non_finite
};

struct RouteArgs {
  void* topk_weights;             // [T, K] fp32 (fp64 for fp64 logits)
  int32_t* topk_ids;              // [T, K]
  const void* router_logits;      // [T, E] dtype
  const void* expert_bias;        // [E] fp32 (fp64 for fp64 logits), or null
  const int32_t* route_override;  // [T, K], or null
  int64_t num_tokens, num_experts, top_k;
  DType dtype;
  RouteOptions options;
  // CUDA with check_finite only, on the device: [1] set to 1 if any logit is NaN or infinite, else to 0. route_cuda
  // does not wait for the device, so it cannot return kNonFiniteLogits: whoever asks for the check reads this, which
  // waits.
  int32_t* non_finite = nullptr;
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
Status route_cuda(const RouteArgs& args, const CudaContext& cuda);
Status route_backward_cpu(const RouteBackwardArgs& args, const ThreadPool& pool);
Status route_backward_cuda(const RouteBackwardArgs& args, const CudaContext& cuda);

}  // namespace moe
