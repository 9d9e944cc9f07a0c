// Sums and maxima in a fixed order that the compiler can vectorise: lane j takes elements j, j + kLanes, ...
// The result depends on the data alone, never on threads or on the instruction set's width.
#pragma once

#include <cstdint>
#include <limits>

namespace moe {

inline constexpr int64_t kLanes = 16;

// Folds term(i) for i in [0, n) with `fold`, from `start` in every lane.
template <typename W, typename Term, typename Fold>
W reduce(int64_t n, W start, const Term& term, const Fold& fold) {
  W lanes[kLanes];
  for (W& lane : lanes) lane = start;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t j = 0; j < kLanes; ++j) lanes[j] = fold(lanes[j], term(i + j));
  }
  for (int64_t j = 0; i + j < n; ++j) lanes[j] = fold(lanes[j], term(i + j));
  for (int64_t width = kLanes / 2; width > 0; width /= 2) {
    for (int64_t j = 0; j < width; ++j) lanes[j] = fold(lanes[j], lanes[j + width]);
  }
  return lanes[0];
}

template <typename W, typename Term>
W reduce_sum(int64_t n, const Term& term) {
  return reduce(n, W{0}, term, [](W a, W b) { return a + b; });
}

// NaN is passed over; -infinity when there is nothing else.
template <typename W>
W reduce_max(const W* x, int64_t n) {
  return reduce(
      n, -std::numeric_limits<W>::infinity(), [x](int64_t i) { return x[i]; }, [](W a, W b) { return b > a ? b : a; });
}

}  // namespace moe
