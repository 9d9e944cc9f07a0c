// route_backward of a run of tokens (formulas: moe/route.h).
#pragma once

#include "route/weights.h"

namespace moe::MOE_ISA {

template <typename T>
void route_token_backward(const RouteBackwardArgs& args, int64_t token, const RouteWorkspace<Wide<T>>& work) {
  using Real = Wide<T>;
  const RouteOptions& options = args.options;
  const int64_t num_experts = args.num_experts;
  const T* logits = static_cast<const T*>(args.router_logits) + token * num_experts;
  const Real* grad_weights = static_cast<const Real*>(args.grad_topk_weights) + token * args.top_k;
  const int32_t* ids = args.topk_ids + token * args.top_k;
  T* grad_logits = static_cast<T*>(args.grad_router_logits) + token * num_experts;
  const bool is_softmax = options.score_function == ScoreFunction::kSoftmax;
  const Real *w = work.weights, *v = work.scores;
  Real *g = work.grads, *z = work.logits;

  // 1. The selection (ids out of range left out): ids, gradients g and weights w before renormalisation.
  int64_t n = 0;
  for (int64_t j = 0; j < args.top_k; ++j) {
    if (ids[j] < 0 || ids[j] >= num_experts) continue;
    work.picks[n] = ids[j];
    g[n++] = grad_weights[j] * static_cast<Real>(options.routed_scaling_factor);
  }
  std::optional<Softmax<Real>> of_all;
  if (scores_all(options)) {
    load_logits(logits, num_experts, z);
    of_all = softmax(z, route_padded(num_experts), work.scores);
  } else {
    for (int64_t j = 0; j < n; ++j) z[work.picks[j]] = widen(logits[work.picks[j]]);
  }
  weigh(options, z, of_all, n, work);
  const auto dot = [&] {
    Real sum = 0;
    for (int64_t j = 0; j < n; ++j) sum += g[j] * w[j];
    return sum;
  };

  // 2. Through the renormalisation.
  if (options.renormalize) {
    const auto [length, divisor, clamped] = norm(options, w, n);
    const Real p = static_cast<Real>(options.renormalize_p), shared = clamped ? 0 : dot() / divisor;
    for (int64_t j = 0; j < n; ++j) {
      g[j] = (g[j] - (p == 1 ? shared : shared * std::pow(w[j] / length, p - 1))) / divisor;
    }
  }

  // 3. Through the scores; the row of gradients replaces the logits.
  const Real mean = is_softmax ? dot() : Real{0};
  if (!is_softmax) through_score(options.score_function, work.choice, w, route_padded(n), g);
  for_vectors<Real>(num_experts,
                    [&](auto load, auto store) { store(z, of_all ? broadcast(-mean) * load(v) : Vec<Real>{}); });
  for (int64_t j = 0; j < n; ++j) {
    z[work.picks[j]] += !is_softmax ? g[j] : w[j] * (of_all ? g[j] : g[j] - mean);
  }
  for_vectors<Real>(num_experts, [&](auto load, auto store) { store(grad_logits, load(z)); });
}

template <typename T>
void backward(const RouteBackwardArgs& args, int64_t begin, int64_t end, const RouteWorkspace<Wide<T>>& work) {
  for (int64_t token = begin; token < end; ++token) route_token_backward<T>(args, token, work);
}

}  // namespace moe::MOE_ISA
