// Rows between ranks: one token to and from its wire type.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "convert.h"
#include "moe/ep_row.h"
#include "reduce.h"

namespace moe {

inline constexpr float kLargestFp8 = 448, kLargestInt8 = 127;

// e4m3 without infinities: sign, 4 bits of exponent (bias 7), 3 of mantissa; 0x7f is NaN. |x| <= 448 or NaN.
inline uint8_t to_fp8(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x), sign = bits >> 24 & 0x80u, magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - ((127u - 7u) << 23) + 0x7ffffu + ((magnitude >> 20) & 1u)) >> 20;
  // Below 2^-6 the addition of 2^14 leaves exactly the bits of the subnormal, whose unit is 2^-9.
  const uint32_t subnormal = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 16384.0f) - 0x46800000u;
  const uint32_t value = magnitude > 0x7f800000u ? 0x7fu : magnitude < (127u - 6u) << 23 ? subnormal : normal;
  return static_cast<uint8_t>(sign | std::min(value, 0x7fu));
}

inline float from_fp8(uint8_t bits) {
  const uint32_t magnitude = bits & 0x7fu;
  const float normal = std::bit_cast<float>((magnitude << 20) + ((127u - 7u) << 23));
  const float subnormal = static_cast<float>(magnitude) * 0x1p-9f;
  const float value = magnitude == 0x7fu ? std::bit_cast<float>(0x7fc00000u) : magnitude < 8 ? subnormal : normal;
  return bits & 0x80u ? -value : value;
}

inline int8_t to_int8(float x) {
  return static_cast<int8_t>(std::nearbyint(std::clamp(std::isnan(x) ? 0.0f : x, -kLargestInt8, kLargestInt8)));
}

template <typename T>
void to_wire(const T* hidden, const EpRow& row, uint8_t* bytes) {
  const int64_t n = row.hidden_size;
  if (row.wire == Wire::kInput) {
    std::memcpy(bytes, hidden, static_cast<size_t>(row.hidden_bytes()));
    return;
  }
  const bool fp8 = row.wire == Wire::kFp8;
  // NOTE: NaN has to reach the scale, so that it is not lost; a maximum would pass it over.
  const float sum = reduce_sum<float>(n, [&](int64_t j) { return static_cast<float>(widen(hidden[j])) * 0.0f; });
  const float largest = reduce(
      n, 0.0f, [&](int64_t j) { return std::abs(static_cast<float>(widen(hidden[j]))); },
      [](float a, float b) { return b > a ? b : a; });
  const float scale = largest / (fp8 ? kLargestFp8 : kLargestInt8) + sum;
  const float inverse = scale > 0 && std::isfinite(scale) ? 1 / scale : 0;
  for (int64_t j = 0; j < n; ++j) {
    const float largest_q = fp8 ? kLargestFp8 : kLargestInt8;
    const float q = std::clamp(static_cast<float>(widen(hidden[j])) * inverse, -largest_q, largest_q);
    bytes[j] = fp8 ? to_fp8(q) : static_cast<uint8_t>(to_int8(q));
  }
  std::memcpy(bytes + row.scale_at(), &scale, sizeof(scale));
}

template <typename T>
void from_wire(const uint8_t* bytes, const EpRow& row, T* hidden) {
  const int64_t n = row.hidden_size;
  if (row.wire == Wire::kInput) {
    std::memcpy(hidden, bytes, static_cast<size_t>(row.hidden_bytes()));
    return;
  }
  float scale;
  std::memcpy(&scale, bytes + row.scale_at(), sizeof(scale));
  if (row.wire == Wire::kFp8) {
    for (int64_t j = 0; j < n; ++j) hidden[j] = narrow<T>(static_cast<Wide<T>>(scale) * from_fp8(bytes[j]));
  } else {
    for (int64_t j = 0; j < n; ++j) {
      hidden[j] = narrow<T>(static_cast<Wide<T>>(scale) * static_cast<Wide<T>>(static_cast<int8_t>(bytes[j])));
    }
  }
}

}  // namespace moe
