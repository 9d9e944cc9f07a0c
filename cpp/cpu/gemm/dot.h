// Dot-product micro-kernel: c[i, j] (+)= <a[i], w[j]>, straight on the row-major weight.
//
// For experts with few rows: nothing is packed, both operands are read along k by whole vectors, the weight is widened
// in registers, and each element of it is read once. `Columns` weight rows are as many streams from memory.
#pragma once

#include <algorithm>

#include "gemm/kernels.h"
#include "gemm/simd.h"

namespace moe::MOE_ISA {

template <int Rows>
inline constexpr int kDotColumns = std::min<int>(kMaxTileRows, MOE_ACCUMULATORS / Rows);

template <typename Storage, int Rows>
void dot_tile(int columns, const Wide<Storage>* const* a, const Storage* const* w, int64_t k, Wide<Storage>* c,
              int64_t ldc, bool accumulate, int64_t ahead) {
  using Real = Wide<Storage>;
  constexpr int kColumns = kDotColumns<Rows>;
  const Real* a_row[Rows];
  const Storage* w_row[kColumns];
  Vec<Real> tile[Rows][kColumns];
#pragma GCC unroll 8
  for (int j = 0; j < kColumns; ++j) w_row[j] = w[std::min(j, columns - 1)];  // a missing row repeats the last one
#pragma GCC unroll 4
  for (int i = 0; i < Rows; ++i) {
    a_row[i] = a[i];
#pragma GCC unroll 8
    for (int j = 0; j < kColumns; ++j) tile[i][j] = Vec<Real>{};
  }
  const auto step = [&](auto load_a, auto load_w) {
    Vec<Real> a_vector[Rows];
#pragma GCC unroll 4
    for (int i = 0; i < Rows; ++i) a_vector[i] = load_a(a_row[i]);
#pragma GCC unroll 8
    for (int j = 0; j < kColumns; ++j) {
      const Vec<Real> w_vector = load_w(w_row[j]);
#pragma GCC unroll 4
      for (int i = 0; i < Rows; ++i) tile[i][j] += a_vector[i] * w_vector;
    }
  };
  int64_t x = 0;
  for (; x + kLanes<Real> <= k; x += kLanes<Real>) {
    step([x](const Real* p) { return load(p + x); },
         [x, ahead](const Storage* p) {
           fetch(p + x + ahead);
           return load(p + x);
         });
  }
  if (const int64_t rest = k - x; rest > 0) {
    step([=](const Real* p) { return load_first(p + x, rest); },
         [=](const Storage* p) { return load_first(p + x, rest); });
  }
  // The sums of kLanes vectors at a time.
  constexpr int kSums = Rows * kColumns, kGroups = (kSums + kLanes<Real> - 1) / kLanes<Real>;
  Real sums[kGroups * kLanes<Real>];
#pragma GCC unroll 16
  for (int g = 0; g < kGroups; ++g) {
    Vec<Real> group[kLanes<Real>];
#pragma GCC unroll 16
    for (int l = 0; l < kLanes<Real>; ++l) {
      const int at = g * kLanes<Real> + l;
      group[l] = at < kSums ? tile[at / kColumns][at % kColumns] : Vec<Real>{};
    }
    sum_lanes<Real>(group);
    store(sums + g * kLanes<Real>, group[0]);
  }
  for (int i = 0; i < Rows; ++i) {
    Real* out = c + i * ldc;
    const Real* sum = sums + i * kColumns;
    if (accumulate) {
      for (int j = 0; j < columns; ++j) out[j] += sum[j];
    } else {
      std::copy_n(sum, columns, out);
    }
  }
}

template <typename Storage>
void dot(int rows, int columns, const Wide<Storage>* const* a, const Storage* const* w, int64_t k, Wide<Storage>* c,
         int64_t ldc, bool accumulate, int64_t ahead) {
  static_assert(kMaxDotRows == 4, "one case per number of rows");
  switch (rows) {
    case 1:
      return dot_tile<Storage, 1>(columns, a, w, k, c, ldc, accumulate, ahead);
    case 2:
      return dot_tile<Storage, 2>(columns, a, w, k, c, ldc, accumulate, ahead);
    case 3:
      return dot_tile<Storage, 3>(columns, a, w, k, c, ldc, accumulate, ahead);
    case 4:
      return dot_tile<Storage, 4>(columns, a, w, k, c, ldc, accumulate, ahead);
  }
}

}  // namespace moe::MOE_ISA
