// Dot products of rows that lie four to a vector: c[i, j] = <a[i], w[j]>, straight on the row-major weight.
//
// For rows too few to fill the lanes of `outer` and too many for `dot`, which pays for the sums across all lanes
// of a vector. A vector holds the next kFourDepth elements of each of four rows; the same elements of a weight row are
// repeated four times, by a broadcast; what remains to be added up at the end are groups of kFourDepth lanes. 8 columns
// and 12 rows cost 11 loads for 24 FMAs, and no lane is wasted but those of rows that are missing from the last four.
#pragma once

#include <algorithm>

#include "gemm/kernels.h"
#include "gemm/outer.h"
#include "gemm/simd.h"

namespace moe::MOE_ISA {

// Elements of a row side by side in a vector.
template <typename Real>
inline constexpr int kFourDepth = std::max<int>(kLanes<Real> / kRowsOfVector, 1);

// As many as leave registers for a vector of every four rows and one of the weight. With one element side by side,
// `outer` does the same.
template <typename Real>
inline constexpr int kMostFoursRows = kFourDepth<Real> == 1    ? 0
                                      : MOE_ACCUMULATORS >= 24 ? 24
                                                               : 12;
static_assert(kMostFoursRows<float> <= kMaxFoursRows);

// q: [ceil(k / kFourDepth)][ceil(m / 4)] vectors; what pads rows and k is zero.
template <typename Real>
void pack_fours(const Real* const* rows, int64_t m, int64_t k, Real* q) {
  constexpr int64_t kDepth = kFourDepth<Real>;
  const int64_t padded = (m + kRowsOfVector - 1) / kRowsOfVector * kRowsOfVector;
  for (int64_t x = 0; x < k; x += kDepth, q += padded * kDepth) {
    for (int64_t i = 0; i < m; ++i) {
      if (k - x >= kDepth) {
        std::memcpy(q + i * kDepth, rows[i] + x, kDepth * sizeof(Real));
      } else {
        std::fill_n(std::copy_n(rows[i] + x, k - x, q + i * kDepth), kDepth - (k - x), Real(0));
      }
    }
    std::fill(q + m * kDepth, q + padded * kDepth, Real(0));
  }
}

// kFourDepth elements, four times.
template <typename Real>
inline Vec<Real> repeat(const Real* p) {
#if MOE_VECTOR_BYTES == 64
  return reinterpret_cast<Vec<Real>>(
      _mm512_maskz_broadcast_f32x4(0xffff, _mm_loadu_ps(reinterpret_cast<const float*>(p))));
#elif defined(__AVX2__)
  double element;
  std::memcpy(&element, p, sizeof(element));
  return reinterpret_cast<Vec<Real>>(_mm256_set1_pd(element));
#else
  Vec<Real> out;
  for (int l = 0; l < kLanes<Real>; ++l) out[l] = p[l % kFourDepth<Real>];
  return out;
#endif
}

// Lane t * kFourDepth + j of v[0] becomes the sum of group t of lanes of v[j].
template <typename Real, int Width = 1>
inline void sum_groups(Vec<Real>* v) {
  if constexpr (Width < kFourDepth<Real>) {
    for (int i = 0; i < kFourDepth<Real>; i += 2 * Width) {
      swap_blocks<Real, Width>(v[i], v[i + Width], std::make_integer_sequence<int, kLanes<Real>>{});
      v[i] += v[i + Width];
    }
    sum_groups<Real, 2 * Width>(v);
  }
}

// out (+)= the first `count` of kFourDepth totals.
template <typename Real>
inline void add_few(const Real* totals, int64_t count, bool add, Real* out) {
  using Few = typename VectorOf<Real, kFourDepth<Real> * sizeof(Real)>::Unaligned;
  if (count == kFourDepth<Real>) {
    const Few x = *reinterpret_cast<const Few*>(totals);
    Few& sum = *reinterpret_cast<Few*>(out);
    sum = add ? Few(sum + x) : x;
  } else {
    for (int64_t i = 0; i < count; ++i) out[i] = (add ? out[i] : Real(0)) + totals[i];
  }
}

template <typename Real, bool Pairs, int Vectors>
void fours_tile(int rows, int columns, const Real* q, const Real* w, int64_t stride, int64_t k, Real* c, int64_t ldc,
                TileStore how, Fetch fetch) {
  constexpr int n = kLanes<Real>, kDepth = kFourDepth<Real>;
  constexpr int kColumns = std::min<int>(kMaxTileRows, MOE_ACCUMULATORS / Vectors);
  constexpr int kGroups = (kColumns + kDepth - 1) / kDepth;
  const Real* column[kColumns];
  Vec<Real> sums[Vectors][kGroups * kDepth] = {};
#pragma GCC unroll 8
  for (int j = 0; j < kColumns; ++j)
    column[j] = w + std::min(j, columns - 1) * stride;  // a missing one: the last again
  const auto step = [&](int64_t x, auto load_w) __attribute__((always_inline)) {
    Vec<Real> a[Vectors];
#pragma GCC unroll 6
    for (int v = 0; v < Vectors; ++v) a[v] = in_register(load(q + v * n));
#pragma GCC unroll 8
    for (int j = 0; j < kColumns; ++j) {
      const Vec<Real> element = in_register(load_w(column[j] + x));
#pragma GCC unroll 6
      for (int v = 0; v < Vectors; ++v) {
        if constexpr (Pairs) {
          sums[v][j] = add_pairs(sums[v][j], a[v], element);
        } else {
          sums[v][j] += a[v] * element;
        }
      }
    }
    q += Vectors * n;
  };
  const auto whole = [](const Real* p) __attribute__((always_inline)) { return repeat(p); };
  int64_t x = 0;
  if (fetch.at == nullptr) {
#pragma GCC unroll 1
    for (; x + kDepth <= k; x += kDepth) step(x, whole);
  } else {
#pragma GCC unroll 1
    for (; x + kDepth <= k; x += kDepth) {
      fetch_step(fetch);
      step(x, whole);
    }
  }
  if (const int64_t rest = k - x; rest > 0) {
    step(x, [rest](const Real* p) {
      Real elements[kFourDepth<Real>] = {};
      std::copy_n(p, rest, elements);
      return repeat(elements);
    });
  }
#pragma GCC unroll 6
  for (int v = 0; v < Vectors; ++v) {
#pragma GCC unroll 8
    for (int j = 0; j < kGroups * kDepth; j += kDepth) {
      sum_groups<Real>(&sums[v][j]);
      alignas(MOE_VECTOR_BYTES) Real totals[n];
      store(totals, sums[v][j]);
      const int64_t count = std::min<int64_t>(kDepth, columns - j);
#pragma GCC unroll 4
      for (int t = 0; t < kRowsOfVector; ++t) {
        if (v * kRowsOfVector + t >= rows || count <= 0) break;
        add_few(totals + t * kDepth, count, how == TileStore::kAdd, c + (v * kRowsOfVector + t) * ldc + j);
      }
    }
  }
}

template <typename Real, bool Pairs>
void dot_fours(int rows, int columns, const Real* q, const Real* w, int64_t stride, int64_t k, Real* c, int64_t ldc,
               TileStore how, Fetch fetch) {
  static_assert(kMaxFoursRows == 6 * kRowsOfVector, "one case per number of vectors");
  const auto run = [&]<int Vectors>() {
    if constexpr (Vectors * kRowsOfVector <= kMostFoursRows<Real>) {
      fours_tile<Real, Pairs, Vectors>(rows, columns, q, w, stride, k, c, ldc, how, fetch);
    }
  };
  switch ((rows + kRowsOfVector - 1) / kRowsOfVector) {
    case 1:
      return run.template operator()<1>();
    case 2:
      return run.template operator()<2>();
    case 3:
      return run.template operator()<3>();
    case 4:
      return run.template operator()<4>();
    case 5:
      return run.template operator()<5>();
    case 6:
      return run.template operator()<6>();
  }
}

}  // namespace moe::MOE_ISA
