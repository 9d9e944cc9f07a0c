// Element types: storage <-> the type that arithmetic is done in (fp32, and fp64 for fp64).
// Branch-free, so that loops over them vectorise on any instruction set.
#pragma once

#include <bit>
#include <cstdint>
#include <type_traits>

#include "moe/types.h"

namespace moe {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <typename T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(BFloat16 x) { return std::bit_cast<float>(uint32_t{x.bits} << 16); }
inline float widen(Float16 x) {
  constexpr uint32_t kRebias = (127 - 15) << 23;
  const uint32_t magnitude = (x.bits & 0x7fffu) << 13, exponent = magnitude & (0x1fu << 23);
  const float normal = std::bit_cast<float>(magnitude + kRebias);
  // NOTE: a subnormal is rebuilt by a subtraction of normal numbers, which also works when subnormals are flushed.
  const float subnormal =
      std::bit_cast<float>(magnitude + kRebias + (1u << 23)) - std::bit_cast<float>(kRebias + (1u << 23));
  const float special = std::bit_cast<float>(magnitude + 2 * kRebias);  // infinity and NaN
  const float value = exponent == 0 ? subnormal : exponent == (0x1fu << 23) ? special : normal;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(value) | (uint32_t{x.bits} & 0x8000u) << 16);
}

// Rounds to nearest, ties to even; NaN stays NaN, and what is too large becomes infinite.
template <typename T>
T narrow(Wide<T> x);

template <>
inline float narrow<float>(float x) {
  return x;
}
template <>
inline double narrow<double>(double x) {
  return x;
}
template <>
inline BFloat16 narrow<BFloat16>(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t nan = (bits >> 16) | 0x40u;
  return {static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded)};
}
template <>
inline Float16 narrow<Float16>(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x), sign = bits & 0x80000000u, magnitude = bits ^ sign;
  const uint32_t normal = (magnitude - ((127u - 15u) << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Below 2^-14 the addition of 0.5 leaves exactly the bits of the subnormal, rounded by the processor.
  const uint32_t subnormal = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t half = magnitude >= (127u + 16u) << 23 ? special : magnitude < (127u - 14u) << 23 ? subnormal : normal;
  return {static_cast<uint16_t>(half | sign >> 16)};
}

// Calls fn(std::type_identity<T>{}) with the element type T of `dtype`.
template <typename Fn>
decltype(auto) dispatch(DType dtype, const Fn& fn) {
  switch (dtype) {
    case DType::kFloat64:
      return fn(std::type_identity<double>{});
    case DType::kBFloat16:
      return fn(std::type_identity<BFloat16>{});
    case DType::kFloat16:
      return fn(std::type_identity<Float16>{});
    case DType::kFloat32:
      break;
  }
  return fn(std::type_identity<float>{});
}

}  // namespace moe
