// Scores and weights of a selection, shared by route and its backward (formulas: moe/route.h).
#pragma once

#include "activation.cuh"
#include "moe/route.h"

namespace moe::cuda {

template <typename Real>
constexpr Real kNone = static_cast<Real>(-INFINITY);

// RouteOptions as a kernel argument: numbers already in the type that they are used in.
template <typename Real>
struct RouteRule {
  ScoreFunction score_function;
  EpsMode eps_mode;
  GroupScore group_score;
  GroupMask group_mask;
  bool scores_first, renormalize;
  int32_t num_groups, topk_groups;
  Real p, eps, scale;

  explicit RouteRule(const RouteOptions& o)
      : score_function(o.score_function),
        eps_mode(o.renormalize_eps_mode),
        group_score(o.group_score),
        group_mask(o.group_mask),
        scores_first(o.score_order == ScoreOrder::kScoreThenTopK),
        renormalize(o.renormalize),
        num_groups(static_cast<int32_t>(o.num_groups)),
        topk_groups(static_cast<int32_t>(o.topk_groups)),
        p(static_cast<Real>(o.renormalize_p)),
        eps(static_cast<Real>(o.renormalize_eps)),
        scale(static_cast<Real>(o.routed_scaling_factor)) {}

  __device__ __forceinline__ bool is_softmax() const { return score_function == ScoreFunction::kSoftmax; }
  // Renormalisation divides by `divisor`: the length (sum w^p)^(1/p) with eps.
  struct Norm {
    Real length, divisor;
    bool clamped;  // eps is the larger: the divisor does not depend on the weights
  };
  __device__ __forceinline__ Real power(Real w) const { return p == 1 ? w : pow(w, p); }
  __device__ __forceinline__ Norm norm(Real sum_of_powers) const {
    const Real length = p == 1 ? sum_of_powers : pow(sum_of_powers, 1 / p);
    if (eps_mode == EpsMode::kAdd) return {length, length + eps, false};
    return {length, length < eps ? eps : length, length < eps};
  }
  // A score depends on the logits of all experts.
  __device__ __forceinline__ bool over_all() const { return scores_first && is_softmax(); }
};

// A softmax, once its maximum and sum are known.
template <typename Real>
struct Softmax {
  Real largest = 0, scale = 0;
  __device__ __forceinline__ Real exponent(Real z) const { return exponential<Real>(z - largest); }
  __device__ __forceinline__ Real operator()(Real z) const { return exponent(z) * scale; }
};

// The score of a logit: by the softmax, or on its own.
template <typename Real>
__device__ __forceinline__ Real score(const RouteRule<Real>& rule, const Softmax<Real>& softmax, Real z) {
  if (rule.is_softmax()) return softmax(z);
  if (rule.score_function == ScoreFunction::kSigmoid) return sigmoid<Real>(z);
  return sqrt((z < 0 ? Real{0} : z) + log1p(exponential<Real>(z < 0 ? z : -z)));  // without overflow on either side
}

// d score / dz of a score v that depends on its own logit alone.
template <typename Real>
__device__ __forceinline__ Real score_slope(const RouteRule<Real>& rule, Real z, Real v) {
  // sigmoid(-z) and not 1 - v, which cancels where v is near 1. A root of 0 has the limit 0; NaN stays.
  if (rule.score_function == ScoreFunction::kSigmoid) return v * sigmoid<Real>(-z);
  return v > 0 ? sigmoid<Real>(z) / (2 * v) : v;
}

// The larger one, of which x is no NaN; a NaN in y is passed over.
template <typename Real>
__device__ __forceinline__ Real larger(Real x, Real y) {
  return y > x ? y : x;
}
template <typename Real>
__device__ __forceinline__ Real warp_max(Real x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x = larger(x, __shfl_xor_sync(~0u, x, step));
  return x;
}

// The selection of one token, in a warp: lane l has the choices l, l + 32, .. A functor gives the id of a choice, so
// that the first 32 may be in registers.
template <typename T, typename Ids>
class Selection {
  using Real = Wide<T>;

 public:
  // `softmax` is the one over all experts, and is replaced where the softmax is over the selection.
  __device__ __forceinline__ Selection(const RouteRule<Real>& rule, const T* logits, int num_experts, int top_k,
                                       const Ids& ids, Softmax<Real> softmax)
      : rule_(rule), logits_(logits), num_experts_(num_experts), top_k_(top_k), ids_(ids), softmax_(softmax) {
    if (rule.is_softmax() && !rule.over_all()) {
      Real largest = kNone<Real>, sum = 0;
      for_each([&](int j) { largest = valid(j) ? larger(largest, logit(j)) : largest; });
      softmax_.largest = warp_max(largest);
      for_each([&](int j) { sum += valid(j) ? softmax_.exponent(logit(j)) : Real{0}; });
      softmax_.scale = 1 / warp_sum(sum);
    }
    const int lane = threadIdx.x % 32;
    first_ = lane < top_k ? compute_weight(lane) : 0;
  }

  // Calls fn(j) for the lane's choices.
  template <typename Fn>
  __device__ __forceinline__ void for_each(const Fn& fn) const {
    for (int j = threadIdx.x % 32; j < top_k_; j += 32) fn(j);
  }
  __device__ __forceinline__ int32_t id(int j) const { return ids_(j); }
  __device__ __forceinline__ bool valid(int j) const { return id(j) >= 0 && id(j) < num_experts_; }
  __device__ __forceinline__ Real logit(int j) const { return widen(logits_[id(j)]); }
  // Before renormalisation; 0 for an id out of range. Only the first 32 are kept.
  __device__ __forceinline__ Real weight(int j) const { return j < 32 ? first_ : compute_weight(j); }

  __device__ __forceinline__ typename RouteRule<Real>::Norm norm() const {
    if (!rule_.renormalize) return {1, 1, true};
    Real sum = 0;
    for_each([&](int j) { sum += rule_.power(weight(j)); });
    return rule_.norm(warp_sum(sum));
  }

 private:
  __device__ __forceinline__ Real compute_weight(int j) const {
    return valid(j) ? score(rule_, softmax_, logit(j)) : Real{0};
  }

  const RouteRule<Real>& rule_;
  const T* logits_;
  int num_experts_, top_k_;
  const Ids& ids_;
  Softmax<Real> softmax_;
  Real first_;
};

}  // namespace moe::cuda
