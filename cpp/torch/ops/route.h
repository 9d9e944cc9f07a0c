// Tensors to RouteArgs and RouteBackwardArgs.
#pragma once

#include <optional>
#include <tuple>

#include "checks.h"
#include "moe/route.h"

namespace moe {

inline ScoreFunction parse_score_function(const Op& op, const std::string& text) {
  return op.parse<ScoreFunction>("score_function", text,
                                 {{"softmax", ScoreFunction::kSoftmax},
                                  {"sigmoid", ScoreFunction::kSigmoid},
                                  {"sqrtsoftplus", ScoreFunction::kSqrtSoftplus}});
}

inline ScoreOrder parse_score_order(const Op& op, const std::string& text) {
  return op.parse<ScoreOrder>(
      "score_order", text,
      {{"score_then_topk", ScoreOrder::kScoreThenTopK}, {"topk_then_score", ScoreOrder::kTopKThenScore}});
}

inline GroupScore parse_group_score(const Op& op, const std::string& text) {
  return op.parse<GroupScore>("group_score", text, {{"top2_sum", GroupScore::kTop2Sum}, {"max", GroupScore::kMax}});
}

inline GroupMask parse_group_mask(const Op& op, const std::string& text) {
  return op.parse<GroupMask>("group_mask", text, {{"-inf", GroupMask::kNegativeInfinity}, {"zero", GroupMask::kZero}});
}

inline EpsMode parse_eps_mode(const Op& op, const std::string& text) {
  return op.parse<EpsMode>("renormalize_eps_mode", text, {{"add", EpsMode::kAdd}, {"clamp", EpsMode::kClamp}});
}

inline void check_renormalize(const Op& op, double p, double eps) {
  if (!(p >= 1)) op.fail("renormalize_p", "be at least 1", std::to_string(p));
  if (!(eps >= 0)) op.fail("renormalize_eps", "not be negative", std::to_string(eps));
}

inline void check_selection(const Op& op, int64_t num_experts, int64_t top_k, int64_t num_groups, int64_t topk_groups) {
  op.at_least("top_k", top_k, 1);
  if (top_k > num_experts) {
    op.fail("top_k", "be at most num_experts = " + std::to_string(num_experts), std::to_string(top_k));
  }
  op.at_least("num_groups", num_groups, 1);
  if (num_experts % num_groups != 0) {
    op.fail("num_groups", "divide num_experts = " + std::to_string(num_experts), std::to_string(num_groups));
  }
  op.at_least("topk_groups", topk_groups, 1);
  if (topk_groups > num_groups) {
    op.fail("topk_groups", "be at most num_groups = " + std::to_string(num_groups), std::to_string(topk_groups));
  }
  const int64_t eligible = topk_groups * (num_experts / num_groups);
  if (eligible < top_k) {
    op.fail("topk_groups", "keep at least top_k = " + std::to_string(top_k) + " experts",
            std::to_string(topk_groups) + " groups of " + std::to_string(num_experts / num_groups),
            "raise topk_groups or lower num_groups");
  }
}

template <typename Device>
std::tuple<Tensor, Tensor> route(const Tensor& router_logits, int64_t top_k, const std::optional<Tensor>& expert_bias,
                                 const std::optional<Tensor>& route_override, const std::string& score_function,
                                 const std::string& score_order, bool renormalize, double renormalize_p,
                                 double renormalize_eps, const std::string& renormalize_eps_mode,
                                 double routed_scaling_factor, int64_t num_groups, int64_t topk_groups,
                                 const std::string& group_score, const std::string& group_mask, bool check_finite) {
  const Op op("route", router_logits);
  const Argument logits = op.argument("router_logits", router_logits).rank(2, "[num_tokens, num_experts]").floating();
  const int64_t num_tokens = logits.size(0), num_experts = logits.size(1);
  std::optional<Argument> override;
  if (route_override) {
    override = op.argument("route_override", *route_override)
                   .shape({num_tokens, top_k}, "[num_tokens, top_k]")
                   .type(ScalarType::Int);
  } else {
    check_selection(op, num_experts, top_k, num_groups, topk_groups);
  }
  check_renormalize(op, renormalize_p, renormalize_eps);
  const ScalarType weights_type = weight_type(logits.dtype());
  std::optional<Argument> bias;
  if (expert_bias) {
    bias = op.argument("expert_bias", *expert_bias).shape({num_experts}, "[num_experts]").type(weights_type);
  }
  const RouteOptions options{.score_function = parse_score_function(op, score_function),
                             .score_order = parse_score_order(op, score_order),
                             .renormalize = renormalize,
                             .renormalize_p = renormalize_p,
                             .renormalize_eps = renormalize_eps,
                             .renormalize_eps_mode = parse_eps_mode(op, renormalize_eps_mode),
                             .routed_scaling_factor = routed_scaling_factor,
                             .num_groups = num_groups,
                             .topk_groups = topk_groups,
                             .group_score = parse_group_score(op, group_score),
                             .group_mask = parse_group_mask(op, group_mask),
                             .check_finite = check_finite};
  Tensor topk_weights = op.empty({num_tokens, top_k}, weights_type);
  Tensor topk_ids = op.empty({num_tokens, top_k}, ScalarType::Int);
  op.run<Device>(RouteArgs{.topk_weights = topk_weights.mutable_data_ptr(),
                           .topk_ids = static_cast<int32_t*>(topk_ids.mutable_data_ptr()),
                           .router_logits = logits.data(),
                           .expert_bias = bias ? bias->data() : nullptr,
                           .route_override = override ? override->data<int32_t>() : nullptr,
                           .num_tokens = num_tokens,
                           .num_experts = num_experts,
                           .top_k = top_k,
                           .dtype = logits.dtype(),
                           .options = options});
  return {topk_weights, topk_ids};
}

template <typename Device>
Tensor route_backward(const Tensor& grad_topk_weights, const Tensor& router_logits, const Tensor& topk_ids,
                      const std::string& score_function, const std::string& score_order, bool renormalize,
                      double renormalize_p, double renormalize_eps, const std::string& renormalize_eps_mode,
                      double routed_scaling_factor) {
  const Op op("route_backward", router_logits);
  check_renormalize(op, renormalize_p, renormalize_eps);
  const Argument logits = op.argument("router_logits", router_logits).rank(2, "[num_tokens, num_experts]").floating();
  const Argument ids = op.argument("topk_ids", topk_ids).rank(2, "[num_tokens, top_k]").type(ScalarType::Int);
  const int64_t num_tokens = logits.size(0), num_experts = logits.size(1), top_k = ids.size(1);
  ids.shape({num_tokens, top_k}, "[num_tokens, top_k]");
  const Argument grad = op.argument("grad_topk_weights", grad_topk_weights)
                            .shape({num_tokens, top_k}, "[num_tokens, top_k]")
                            .type(weight_type(logits.dtype()));
  const RouteOptions options{.score_function = parse_score_function(op, score_function),
                             .score_order = parse_score_order(op, score_order),
                             .renormalize = renormalize,
                             .renormalize_p = renormalize_p,
                             .renormalize_eps = renormalize_eps,
                             .renormalize_eps_mode = parse_eps_mode(op, renormalize_eps_mode),
                             .routed_scaling_factor = routed_scaling_factor};
  Tensor grad_router_logits = op.empty({num_tokens, num_experts}, scalar_type(logits.dtype()));
  op.run<Device>(RouteBackwardArgs{.grad_router_logits = grad_router_logits.mutable_data_ptr(),
                                   .grad_topk_weights = grad.data(),
                                   .router_logits = logits.data(),
                                   .topk_ids = ids.data<int32_t>(),
                                   .num_tokens = num_tokens,
                                   .num_experts = num_experts,
                                   .top_k = top_k,
                                   .dtype = logits.dtype(),
                                   .options = options});
  return grad_router_logits;
}

}  // namespace moe
