// The exponential function of a non-positive argument, as softmax and sigmoid need it.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

namespace moe {

// exp(x) for x <= 0, within 2 units in the last place; 0 where the result would be subnormal (x < -87.3); NaN stays
// NaN. Cephes' polynomial after reduction to |r| <= ln(2) / 2; no branch and no call, so that loops vectorise.
inline float exp_nonpositive(float x) {
  constexpr float kSmallest = -87.3365448f, kLog2E = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, held in the low mantissa bits
  const float clamped = x < kSmallest ? kSmallest : x;
  const float shifted = clamped * kLog2E + kRound;
  const float n = shifted - kRound;
  const float r = clamped - n * kLn2High - n * kLn2Low;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const uint32_t exponent = std::bit_cast<uint32_t>(shifted) - std::bit_cast<uint32_t>(kRound) + 127u;
  const float result = p * std::bit_cast<float>(exponent << 23);
  return x < kSmallest ? 0.0f : result;
}

inline double exp_nonpositive(double x) { return std::exp(x); }

// Without overflow on either side.
template <typename W>
W sigmoid(W x) {
  const W e = exp_nonpositive(x < 0 ? x : -x);
  const W r = 1 / (1 + e);
  return x < 0 ? e * r : r;
}

}  // namespace moe
