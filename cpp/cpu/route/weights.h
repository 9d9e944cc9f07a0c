// The weights of a selection before scaling, shared by the forward and the backward.
#pragma once

#include <cmath>
#include <optional>

#include "route/scores.h"

namespace moe::MOE_ISA {

inline bool scores_all(const RouteOptions& options) {
  return options.score_order == ScoreOrder::kScoreThenTopK && options.score_function == ScoreFunction::kSoftmax;
}

// work.weights[0 .. n) = the scores of work.picks[0 .. n), of which work.choice holds the logits afterwards. With
// scores_all, `of_all` makes the logits scores.
template <typename Real>
inline void weigh(const RouteOptions& options, const Real* z, const std::optional<Softmax<Real>>& of_all, int64_t n,
                  const RouteWorkspace<Real>& work) {
  for (int64_t j = 0; j < n; ++j) work.choice[j] = z[work.picks[j]];
  for (int64_t j = n; j < route_padded(n); ++j) work.choice[j] = kNone<Real>;
  if (!of_all) return score(options.score_function, work.choice, route_padded(n), work.weights);
  for (int64_t j = 0; j < n; j += kLanes<Real>) store(work.weights + j, (*of_all)(load(work.choice + j)));
}

// What renormalisation divides by.
template <typename Real>
struct Norm {
  Real length;   // (sum w^p)^(1/p)
  Real divisor;  // with eps
  bool clamped;  // eps is the larger: the divisor does not depend on the weights
};

template <typename Real>
inline Norm<Real> norm(const RouteOptions& options, const Real* w, int64_t n) {
  const Real p = static_cast<Real>(options.renormalize_p), eps = static_cast<Real>(options.renormalize_eps);
  Real sum = 0;
  for (int64_t j = 0; j < n; ++j) sum += p == 1 ? w[j] : std::pow(w[j], p);
  const Real length = p == 1 ? sum : std::pow(sum, 1 / p);
  if (options.renormalize_eps_mode == EpsMode::kAdd) return {length, length + eps, false};
  return {length, length < eps ? eps : length, length < eps};
}

}  // namespace moe::MOE_ISA
