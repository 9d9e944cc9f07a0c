// Scores of a row of logits, by whole vectors. Rows are padded (route/kernels.h) with -infinity, whose score is 0.
#pragma once

#include <cmath>
#include <functional>
#include <limits>

#include "gemm/activate.h"
#include "route/kernels.h"
#include "route/lanes.h"

namespace moe::MOE_ISA {

template <typename Real>
inline constexpr Real kNone = -std::numeric_limits<Real>::infinity();

// log(1 + u) for 0 <= u <= 1: 2 atanh(s) with s = u / (2 + u) <= 1/3, as a series that leaves less than half a unit.
inline Vec<float> log1p(Vec<float> u) {
  const Vec<float> s = u / (u + 2.0f), q = s * s;
  Vec<float> p = broadcast(2.0f / 17);
  p = p * q + 2.0f / 15;
  p = p * q + 2.0f / 13;
  p = p * q + 2.0f / 11;
  p = p * q + 2.0f / 9;
  p = p * q + 2.0f / 7;
  p = p * q + 2.0f / 5;
  p = p * q + 2.0f / 3;
  return p * q * s + 2.0f * s;
}
inline Vec<double> log1p(Vec<double> u) {
  return each_lane(u, [](double x) { return std::log1p(x); });
}

// Without overflow on either side.
template <typename Real>
inline Vec<Real> softplus(Vec<Real> z) {
  return max<Real>(z, Vec<Real>{}) + log1p(exp(z < 0 ? z : -z));
}

template <typename Real>
inline Real largest_of(const Real* x, int64_t padded) {
  Vec<Real> best = broadcast(kNone<Real>);
  for (int64_t i = 0; i < padded; i += kLanes<Real>) best = max<Real>(best, load(x + i));  // NaN is passed over
  return reduced<Real>(best, max<Real>);
}

// What turns logits into scores.
template <typename Real>
struct Softmax {
  Real largest, scale;  // the largest logit; one over the sum of exp(logit - largest)

  Vec<Real> operator()(Vec<Real> z) const { return exp(z - broadcast(largest)) * broadcast(scale); }
};

// The softmax of a row. `v`, unless null, becomes the scores.
template <typename Real>
inline Softmax<Real> softmax(const Real* z, int64_t padded, Real* v) {
  const Real largest = largest_of(z, padded);
  Vec<Real> sums{};
  for (int64_t i = 0; i < padded; i += kLanes<Real>) {
    const Vec<Real> e = exp(load(z + i) - broadcast(largest));
    if (v) store(v + i, e);
    sums += e;
  }
  const Real scale = 1 / reduced<Real>(sums, std::plus<>());
  if (v) {
    for (int64_t i = 0; i < padded; i += kLanes<Real>) store(v + i, load(v + i) * broadcast(scale));
  }
  return {largest, scale};
}

// v[0 .. padded) = score(z[0 .. padded))
template <typename Real>
inline void score(ScoreFunction function, const Real* z, int64_t padded, Real* v) {
  if (function == ScoreFunction::kSoftmax) {
    softmax(z, padded, v);
    return;
  }
  if (function == ScoreFunction::kSigmoid) {
    for (int64_t i = 0; i < padded; i += kLanes<Real>) store(v + i, sigmoid<Real>(load(z + i)));
    return;
  }
  for (int64_t i = 0; i < padded; i += kLanes<Real>) store(v + i, softplus<Real>(load(z + i)));
  for (int64_t i = 0; i < padded; ++i) v[i] = std::sqrt(v[i]);
}

// grads[0 .. padded) *= d score / dz, of a score that depends on its own logit alone; `v` has the scores.
template <typename Real>
inline void through_score(ScoreFunction function, const Real* z, const Real* v, int64_t padded, Real* grads) {
  const bool is_sigmoid = function == ScoreFunction::kSigmoid;
  for (int64_t i = 0; i < padded; i += kLanes<Real>) {
    const Vec<Real> logit = load(z + i), value = load(v + i);
    // sigmoid(-z) and not 1 - v, which cancels where v is near 1. A root of 0 has the limit 0; NaN stays.
    const Vec<Real> derivative =
        is_sigmoid ? value * sigmoid<Real>(-logit) : (value > 0 ? sigmoid<Real>(logit) / (Real(2) * value) : value);
    store(grads + i, load(grads + i) * derivative);
  }
}

// The row widened, and padded with -infinity up to route_padded(n). Returns whether all of it is finite.
template <typename Storage>
inline bool load_logits(const Storage* logits, int64_t n, Wide<Storage>* z) {
  using Real = Wide<Storage>;
  Vec<Real> differences{};
  for_vectors<Real>(n, [&](auto load, auto store) {
    const Vec<Real> x = load(logits);
    store(z, x);
    differences += x - x;  // 0, or NaN
  });
  for (int64_t i = n; i < route_padded(n); ++i) z[i] = kNone<Real>;
  return bits_of<Real>(differences != 0) == 0;
}

}  // namespace moe::MOE_ISA
