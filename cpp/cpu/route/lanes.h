// Across the lanes of one vector.
#pragma once

#include <utility>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "gemm/simd.h"

namespace moe::MOE_ISA {

template <typename Real>
using Mask = decltype(Vec<Real>{} < Vec<Real>{});  // integers of the same width: -1 where true

template <typename Real>
inline Mask<Real> lane_numbers() {
  Mask<Real> lanes;
  for (int i = 0; i < kLanes<Real>; ++i) lanes[i] = i;
  return lanes;
}

// Bit i tells lane i.
template <typename Real>
inline uint64_t bits_of(Mask<Real> mask) {
#if MOE_VECTOR_BYTES == 64
  if constexpr (sizeof(Real) == 4) return _mm512_movepi32_mask(reinterpret_cast<__m512i>(mask));
  if constexpr (sizeof(Real) == 8) return _mm512_movepi64_mask(reinterpret_cast<__m512i>(mask));
#elif MOE_VECTOR_BYTES == 32 && defined(__AVX2__)
  if constexpr (sizeof(Real) == 4) return static_cast<uint32_t>(_mm256_movemask_ps(reinterpret_cast<__m256>(mask)));
  if constexpr (sizeof(Real) == 8) return static_cast<uint32_t>(_mm256_movemask_pd(reinterpret_cast<__m256d>(mask)));
#elif MOE_VECTOR_BYTES == 16 && defined(__SSE2__)
  if constexpr (sizeof(Real) == 4) return static_cast<uint32_t>(_mm_movemask_ps(reinterpret_cast<__m128>(mask)));
  if constexpr (sizeof(Real) == 8) return static_cast<uint32_t>(_mm_movemask_pd(reinterpret_cast<__m128d>(mask)));
#else
  uint64_t bits = 0;
  for (int i = 0; i < kLanes<Real>; ++i) bits |= uint64_t{mask[i] != 0} << i;
  return bits;
#endif
}

// Lane i becomes lane i + Width, around the end.
template <typename Real, int Width>
inline Vec<Real> rotated(Vec<Real> x) {
  return [x]<int... I>(std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(x, x, ((I + Width) % kLanes<Real>)...);
  }(std::make_integer_sequence<int, kLanes<Real>>{});
}

// op(lane, lane) over all lanes, pairwise: its latency counts log2 of them.
template <typename Real, int Width = kLanes<Real> / 2, typename Op>
inline Real reduced(Vec<Real> x, const Op& op) {
  if constexpr (Width == 0)
    return x[0];
  else
    return reduced<Real, Width / 2>(op(x, rotated<Real, Width>(x)), op);
}

}  // namespace moe::MOE_ISA
