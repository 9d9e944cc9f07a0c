// The k largest of a row, in descending order, ties to the lower index; and the groups' scores. No value may be NaN.
#pragma once

#include <bit>
#include <cstring>

#include "route/scores.h"
#include "topk.h"

namespace moe::MOE_ISA {

// What ranking all pairs is good for.
inline constexpr int64_t kMostRanked = 64;

// Sorts the n <= kMostRanked candidates (indices of `values`, ascending) and writes the best k: a candidate's rank is
// how many others come before it, which needs no branch.
template <typename Real>
inline void rank(const Real* values, const int32_t* candidates, int64_t n, int64_t k, int32_t* indices) {
  alignas(MOE_VECTOR_BYTES) Real v[kMostRanked];
  int32_t sorted[kMostRanked];
  for (int64_t i = 0; i < n; ++i) v[i] = values[candidates[i]];
  for (int64_t i = n; i < kMostRanked && i % kLanes<Real> != 0; ++i) v[i] = kNone<Real>;
  for (int64_t i = 0; i < n; i += kLanes<Real>) {
    const Vec<Real> mine = load(v + i);
    const Mask<Real> place = lane_numbers<Real>() + static_cast<int>(i);
    Mask<Real> before{};
    for (int64_t j = 0; j < n; ++j) {
      const Vec<Real> other = broadcast(v[j]);
      before -= (other > mine) | ((other == mine) & (place > static_cast<int>(j)));
    }
    for (int64_t j = 0; j < kLanes<Real> && i + j < n; ++j) sorted[before[j]] = candidates[i + j];
  }
  std::memcpy(indices, sorted, static_cast<size_t>(k) * sizeof(int32_t));
}

// The k-th largest of the maxima of kRoutePad interleaved parts of the row: at least k values are as large, and with
// values in no particular order hardly more.
template <typename Real>
inline Real threshold(const Real* values, int64_t n, int64_t k) {
  constexpr int64_t kVectors = kRoutePad / kLanes<Real>;
  Vec<Real> best[kVectors];
  for (Vec<Real>& b : best) b = broadcast(kNone<Real>);
  for (int64_t i = 0; i < n; i += kRoutePad) {
    for (int64_t j = 0; j < kVectors; ++j) best[j] = max<Real>(best[j], load(values + i + j * kLanes<Real>));
  }
  Vec<Real> least = broadcast(-kNone<Real>);
  for (const Vec<Real>& mine : best) {
    Mask<Real> above{};
    for (const Vec<Real>& others : best) {
      for (int i = 0; i < kLanes<Real>; ++i) above -= broadcast(others[i]) > mine;
    }
    least = above < static_cast<int>(k) ? min<Real>(least, mine) : least;
  }
  return reduced<Real>(least, min<Real>);
}

// values: padded with -infinity (route/kernels.h). indices: [k] out. order: [n] scratch.
template <typename Real>
inline void choose(const Real* values, int64_t n, int64_t k, int32_t* indices, int32_t* order) {
  if (n <= kRoutePad) {
    for (int64_t i = 0; i < n; ++i) order[i] = static_cast<int32_t>(i);
    return rank(values, order, n, k, indices);
  }
  if (k > kRoutePad) return select_top_k(values, n, k, indices, order);

  const Vec<Real> enough = broadcast(threshold(values, n, k));
  int64_t found = 0;
  for (int64_t i = 0; i < n; i += 64) {
    uint64_t bits = 0;
    const int64_t here = n - i < 64 ? n - i : 64;
    for (int64_t j = 0; j < here; j += kLanes<Real>) bits |= bits_of<Real>(load(values + i + j) >= enough) << j;
    if (here < 64) bits &= (uint64_t{1} << here) - 1;
    for (; bits != 0; bits &= bits - 1) order[found++] = static_cast<int32_t>(i + std::countr_zero(bits));
  }
  if (found > kMostRanked) return select_top_k(values, n, k, indices, order);
  rank(values, order, found, k, indices);
}

// Every lane of `first` and `second` becomes the largest and the second of all lanes of both.
template <typename Real, int Width = kLanes<Real> / 2>
inline void merge_lanes(Vec<Real>& first, Vec<Real>& second) {
  if constexpr (Width > 0) {
    const Vec<Real> other = rotated<Real, Width>(first), runner_up = rotated<Real, Width>(second);
    second = max<Real>(min<Real>(first, other), max<Real>(second, runner_up));
    first = max<Real>(first, other);
    merge_lanes<Real, Width / 2>(first, second);
  }
}

// NOTE: reads up to a vector past the group.
template <typename Real>
inline Real group_score(GroupScore kind, const Real* choice, int64_t size) {
  Vec<Real> first = broadcast(kNone<Real>), second = first;
  const Mask<Real> lanes = lane_numbers<Real>();
  for (int64_t i = 0; i < size; i += kLanes<Real>) {
    Vec<Real> x = load(choice + i);
    if (size - i < kLanes<Real>) x = lanes < static_cast<int>(size - i) ? x : broadcast(kNone<Real>);
    second = max<Real>(second, min<Real>(first, x));
    first = max<Real>(first, x);
  }
  merge_lanes<Real>(first, second);
  if (kind == GroupScore::kMax || size == 1) return first[0];
  const Real sum = first[0] + second[0];
  return sum == sum ? sum : kNone<Real>;  // infinity - infinity
}

}  // namespace moe::MOE_ISA
