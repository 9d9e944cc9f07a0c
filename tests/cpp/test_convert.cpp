#include <limits>

#include "support.h"

namespace moe::test {
namespace {

// The nearest value of a format with `digits` significant bits whose smallest normal number is 2^least, ties to even.
double nearest(double x, int digits, int least, double largest) {
  if (x == 0 || std::isinf(x)) return x;
  const int exponent = std::max(std::ilogb(x), least);
  const double unit = std::ldexp(1.0, exponent - digits + 1);
  const double rounded = std::nearbyint(x / unit) * unit;
  return std::abs(rounded) > largest ? std::copysign(std::numeric_limits<double>::infinity(), x) : rounded;
}

TEST(fp16_survives_a_round_trip) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const Float16 half{static_cast<uint16_t>(bits)};
    const float wide = widen(half);
    const bool nan = (bits & 0x7fff) > 0x7c00;
    CHECK(std::isnan(wide) == nan);
    if (!nan)
      CHECK(narrow<Float16>(wide).bits == bits);
    else
      CHECK(std::isnan(widen(narrow<Float16>(wide))));
  }
  CHECK(widen(Float16{1}) == 0x1p-24f);
  CHECK(widen(Float16{0x3c00}) == 1.0f);
  CHECK(widen(Float16{0xfc00}) == -std::numeric_limits<float>::infinity());
}

TEST(narrow_rounds_to_nearest_even) {
  std::mt19937 engine(3);
  for (int i = 0; i < 300000; ++i) {
    // Any finite float, and exact ties of either format.
    uint32_t bits = engine();
    if (i % 3 == 1) bits = (bits & 0xffff0000u) | 0x8000u;
    if (i % 3 == 2) bits = (bits & 0xffffe000u) | 0x1000u;
    const float x = std::bit_cast<float>(bits);
    if (!std::isfinite(x)) continue;
    CHECK(widen(narrow<BFloat16>(x)) == nearest(x, 8, -126, 0x1.fep127));
    CHECK(widen(narrow<Float16>(x)) == nearest(x, 11, -14, 65504));
  }
  CHECK(std::isnan(widen(narrow<BFloat16>(std::bit_cast<float>(0x7f800001u)))));
}

}  // namespace
}  // namespace moe::test
