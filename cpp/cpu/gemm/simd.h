// The vector type of one instruction set, for gemm/<isa>.cpp only, which defines
//   MOE_ISA            the namespace and name of the instruction set
//   MOE_VECTOR_BYTES   the width of its vectors
//   MOE_ACCUMULATORS   how many vectors a tile may keep in registers
//   MOE_TILE_VECTORS   how many vectors wide a tile is at most
// Written on the compiler's vector extension, so that one source serves every instruction set. Everything lives in
// namespace moe::MOE_ISA: the same templates, compiled with other flags, must be other symbols.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "convert.h"
#include "gemm/kernels.h"

namespace moe::MOE_ISA {

// Real is the type of the arithmetic: double for double, float for every other storage type.
template <typename Real, int Bytes = MOE_VECTOR_BYTES>
struct VectorOf {
  static constexpr int kLanes = Bytes / sizeof(Real);
  typedef Real Type __attribute__((vector_size(Bytes)));
  typedef Real Unaligned __attribute__((vector_size(Bytes), aligned(2), may_alias));  // of pairs of 16 bits, too
};
template <typename Real>
using Vec = typename VectorOf<Real>::Type;
template <typename Real>
inline constexpr int kLanes = VectorOf<Real>::kLanes;
// The vector that a tile may end with: half of a wide one, which costs half where the units are 256 bits wide.
inline constexpr int kNarrowBytes = MOE_VECTOR_BYTES == 64 ? 32 : MOE_VECTOR_BYTES;
template <typename Real>
inline constexpr int kNarrowLanes = kNarrowBytes / sizeof(Real);

typedef int32_t Int __attribute__((vector_size(MOE_VECTOR_BYTES)));
typedef uint32_t UInt __attribute__((vector_size(MOE_VECTOR_BYTES)));
typedef uint16_t Half __attribute__((vector_size(MOE_VECTOR_BYTES / 2)));
typedef uint16_t HalfUnaligned __attribute__((vector_size(MOE_VECTOR_BYTES / 2), aligned(2), may_alias));

// Into the caches, wherever p points: a fetch never faults.
// NOTE: always_inline, or GCC takes a call for one without effect, and drops it.
__attribute__((always_inline)) inline void fetch(const void* p) { __builtin_prefetch(p, 0, 3); }
// The same into the second-level cache. Of the first-level one, few lines can be under way at a time: what is read from
// memory from end to end comes a fifth faster this way.
__attribute__((always_inline)) inline void fetch_early(const void* p) { __builtin_prefetch(p, 0, 2); }

// Makes the compiler load x once: it would else repeat the load as an operand of up to three uses, and loads, not
// multiplications, are what a tile runs short of.
template <typename V>
inline V in_register(V x) {
#if defined(__x86_64__)
  asm("" : "+v"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#endif
  return x;
}

template <typename Real>
inline Vec<Real> broadcast(Real x) {
  return x - Vec<Real>{};
}

inline Vec<float> load(const float* p) { return *reinterpret_cast<const VectorOf<float>::Unaligned*>(p); }
inline Vec<double> load(const double* p) { return *reinterpret_cast<const VectorOf<double>::Unaligned*>(p); }

// NOTE: the conversions between 16 and 32 bits are intrinsics because __builtin_convertvector splits its vectors in GCC
// 12, and maskz forms because the plain ones warn of an uninitialised value there.
inline UInt load_16_bits(const void* p) {
#if MOE_VECTOR_BYTES == 64
  return reinterpret_cast<UInt>(
      _mm512_maskz_cvtepu16_epi32(0xffff, _mm256_loadu_si256(static_cast<const __m256i*>(p))));
#elif defined(__AVX2__)
  return reinterpret_cast<UInt>(_mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))));
#else
  return __builtin_convertvector(*static_cast<const HalfUnaligned*>(p), UInt);
#endif
}
inline void store_16_bits(void* p, UInt x) {
#if MOE_VECTOR_BYTES == 64
  _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_maskz_cvtepi32_epi16(0xffff, reinterpret_cast<__m512i>(x)));
#else
  *static_cast<HalfUnaligned*>(p) = __builtin_convertvector(x, Half);
#endif
}

// The even and the odd elements of two vectors' worth: a shift and a mask, where widening in order takes a permutation
// more. Good for sums of products, when both factors are read that way.
inline void load_pairs(const BFloat16* p, Vec<float>& even, Vec<float>& odd) {
  typedef UInt Unaligned __attribute__((aligned(2), may_alias));
  const UInt pairs = in_register(UInt(*reinterpret_cast<const Unaligned*>(p)));
  even = reinterpret_cast<Vec<float>>(pairs << 16);
  odd = reinterpret_cast<Vec<float>>(pairs & 0xffff0000u);
}

// Pairs of BFloat16 in the place of numbers of 32 bits: sums + the products of the first elements + those of the
// second.
#if defined(__AVX512BF16__)
inline constexpr bool kHasPairs = true;
inline __m512 add_pairs(__m512 sums, __m512 a, __m512 b) { return _mm512_dpbf16_ps(sums, (__m512bh)a, (__m512bh)b); }
inline __m256 add_pairs(__m256 sums, __m256 a, __m256 b) { return _mm256_dpbf16_ps(sums, (__m256bh)a, (__m256bh)b); }
template <typename V>
inline V broadcast_pair(const float* p) {
  int32_t pair;
  std::memcpy(&pair, p, sizeof(pair));
  if constexpr (sizeof(V) == 64) {
    return reinterpret_cast<V>(_mm512_set1_epi32(pair));
  } else {
    return reinterpret_cast<V>(_mm256_set1_epi32(pair));
  }
}
#else
inline constexpr bool kHasPairs = false;
#endif

// Pairs of the elements of two rows, the second of which may be missing: zeros.
inline Vec<float> load_zipped(const BFloat16* first, const BFloat16* second) {
  const UInt low = load_16_bits(first);
  return reinterpret_cast<Vec<float>>(second == nullptr ? low : low | (load_16_bits(second) << 16));
}

inline Vec<float> load(const BFloat16* p) { return reinterpret_cast<Vec<float>>(load_16_bits(p) << 16); }

inline Vec<float> load(const Float16* p) {
#if MOE_VECTOR_BYTES == 64
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return reinterpret_cast<Vec<float>>(_mm512_maskz_cvtph_ps(0xffff, half));
#elif defined(__F16C__)
  return reinterpret_cast<Vec<float>>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  Vec<float> out;
  for (int i = 0; i < kLanes<float>; ++i) out[i] = widen(p[i]);
  return out;
#endif
}

inline void store(float* p, Vec<float> x) { *reinterpret_cast<VectorOf<float>::Unaligned*>(p) = x; }
inline void store(double* p, Vec<double> x) { *reinterpret_cast<VectorOf<double>::Unaligned*>(p) = x; }

// Round to nearest, ties to even; NaN stays a (quiet) NaN.
inline void store(BFloat16* p, Vec<float> x) {
  const UInt bits = reinterpret_cast<UInt>(x);
  const UInt rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const UInt is_nan = reinterpret_cast<UInt>(x != x);
  store_16_bits(p, (is_nan & ((bits >> 16) | 0x40)) | (~is_nan & rounded));
}

inline void store(Float16* p, Vec<float> x) {
#if MOE_VECTOR_BYTES == 64
  const __m256i half = _mm512_maskz_cvtps_ph(0xffff, reinterpret_cast<__m512>(x), _MM_FROUND_TO_NEAREST_INT);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half);
#elif defined(__F16C__)
  const __m128i half = _mm256_cvtps_ph(reinterpret_cast<__m256>(x), _MM_FROUND_TO_NEAREST_INT);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), half);
#else
  for (int i = 0; i < kLanes<float>; ++i) p[i] = narrow<Float16>(x[i]);
#endif
}

// A whole vector past the caches, to an aligned address: a cache line so written is not read first.
template <typename Real>
inline void stream(Real* p, Vec<Real> x) {
#if MOE_VECTOR_BYTES == 64
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), reinterpret_cast<__m512i>(x));
#elif defined(__AVX2__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(x));
#else
  store(p, x);
#endif
}
// Stores that went past the caches become visible to other threads.
inline void finish_streams() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// The first n lanes, n < kLanes: the other lanes read as zero and are not written.
template <typename Storage>
inline Vec<Wide<Storage>> load_first(const Storage* p, int64_t n) {
  alignas(MOE_VECTOR_BYTES) Storage lanes[kLanes<Wide<Storage>>] = {};
  std::memcpy(lanes, p, static_cast<size_t>(n) * sizeof(Storage));
  return load(lanes);
}
template <typename Storage>
inline void store_first(Storage* p, Vec<Wide<Storage>> x, int64_t n) {
  alignas(MOE_VECTOR_BYTES) Storage lanes[kLanes<Wide<Storage>>];
  store(lanes, x);
  std::memcpy(p, lanes, static_cast<size_t>(n) * sizeof(Storage));
}

// Calls fn(load, store) for each vector of [0, n), the last one partial, so that fn is written once for whole vectors:
//   for_vectors<float>(n, [&](auto load, auto store) { store(y, f(load(x))); })
template <typename Real, typename Fn>
inline void for_vectors(int64_t n, const Fn& fn) {
  int64_t i = 0;
  for (; i + kLanes<Real> <= n; i += kLanes<Real>) {
    fn([i](const auto* p) { return load(p + i); }, [i](auto* p, Vec<Real> x) { store(p + i, x); });
  }
  if (const int64_t rest = n - i; rest > 0) {
    fn([i, rest](const auto* p) { return load_first(p + i, rest); },
       [i, rest](auto* p, Vec<Real> x) { store_first(p + i, x, rest); });
  }
}

// Swaps the blocks of Width lanes that face each other across the diagonal of the pair (a, b): one step of a transpose.
// Lane i of the results is numbered among the 2n lanes of (a, b).
template <typename Real, int Width, int... I>
inline void swap_blocks(Vec<Real>& a, Vec<Real>& b, std::integer_sequence<int, I...>) {
  constexpr int n = kLanes<Real>;
  const Vec<Real> low = __builtin_shufflevector(a, b, ((I & Width) ? n + I - Width : I)...);
  const Vec<Real> high = __builtin_shufflevector(a, b, ((I & Width) ? n + I : I + Width)...);
  a = low;
  b = high;
}

// Lane i of v[0] becomes the sum of the lanes of v[i]: a transpose that adds as it goes. The order is fixed: pairwise.
template <typename Real, int Width = 1>
inline void sum_lanes(Vec<Real> (&v)[kLanes<Real>]) {
  constexpr int n = kLanes<Real>;
  if constexpr (Width < n) {
#pragma GCC unroll 16
    for (int i = 0; i < n; i += 2 * Width) {
      swap_blocks<Real, Width>(v[i], v[i + Width], std::make_integer_sequence<int, n>{});
      v[i] += v[i + Width];
    }
    sum_lanes<Real, 2 * Width>(v);
  }
}

}  // namespace moe::MOE_ISA
