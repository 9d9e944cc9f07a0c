// Dot-product micro-kernel: c[i, j] = <a[i], w[j]>, straight on the row-major weight.
//
// For experts with few rows: nothing of the weight is packed, both operands are read along k by whole vectors, and each
// element of the weight comes from memory once. `Columns` weight rows are as many streams, which the processor's own
// prefetcher follows.
//
// The lanes of an accumulator are partial sums. They are kept between calls, so that k can be cut into blocks whose
// rows stay in the first-level cache, and added up once, at the end.
#pragma once

#include <algorithm>

#include "gemm/kernels.h"
#include "gemm/simd.h"

namespace moe::MOE_ISA {

// Elements of Storage that one step reads of a row: a vector; of BFloat16 two vectors' worth, either as pairs, where
// the processor multiplies those, or as the even and the odd elements.
template <typename Storage>
inline constexpr int kDotPacking = std::is_same_v<Storage, BFloat16> && kHasPairs ? 2 : 1;
template <typename Storage>
inline constexpr int kDotParts = std::is_same_v<Storage, BFloat16> && !kHasPairs ? 2 : 1;
template <typename Storage>
inline constexpr int kDotStep = kDotPacking<Storage> * kDotParts<Storage> * kLanes<Wide<Storage>>;

// Accumulators and the vectors of a tile's rows share the registers.
template <typename Storage, int Rows>
inline constexpr int kDotColumns =
    std::min<int>(kMaxTileRows, (MOE_ACCUMULATORS - (kDotParts<Storage> == 2 ? 4 : 0)) / Rows);

template <typename Storage>
inline void load_step(const Storage* p, Vec<Wide<Storage>> (&parts)[kDotParts<Storage>]) {
  if constexpr (kDotParts<Storage> == 2) {
    load_pairs(p, parts[0], parts[1]);
  } else if constexpr (kDotPacking<Storage> == 2) {
    parts[0] = in_register(load(reinterpret_cast<const float*>(p)));
  } else {
    parts[0] = in_register(load(p));
  }
}
template <typename Storage>
inline void load_first_of_step(const Storage* p, int64_t n, Vec<Wide<Storage>> (&parts)[kDotParts<Storage>]) {
  Storage elements[kDotStep<Storage>] = {};
  std::memcpy(elements, p, static_cast<size_t>(n) * sizeof(Storage));
  load_step<Storage>(elements, parts);
}

// A row the way `dot` multiplies it: widened, each step's parts side by side, the last step padded with zeros.
template <typename Storage>
void arrange_for_dot(const Storage* src, int64_t n, Wide<Storage>* dst) {
  constexpr int kStep = kDotStep<Storage>, kParts = kDotParts<Storage>;
  Vec<Wide<Storage>> parts[kParts];
  for (int64_t x = 0; x < n; x += kStep, dst += kParts * kLanes<Wide<Storage>>) {
    n - x < kStep ? load_first_of_step(src + x, n - x, parts) : load_step(src + x, parts);
#pragma GCC unroll 2
    for (int part = 0; part < kParts; ++part) store(dst + part * kLanes<Wide<Storage>>, parts[part]);
  }
}

template <typename Storage, int Rows, int Columns>
void dot_tile(int columns, const Wide<Storage>* const* a, const Storage* const* w, int64_t k, Wide<Storage>* sums,
              DotPart part, Wide<Storage>* c, int64_t ldc, int64_t stride, int64_t ahead) {
  using Real = Wide<Storage>;
  constexpr int n = kLanes<Real>, kStep = kDotStep<Storage>, kParts = kDotParts<Storage>;
  const Real* a_row[Rows];
  const Storage* w_row[Columns];
  Vec<Real> tile[Rows][Columns];
#pragma GCC unroll 8
  for (int j = 0; j < Columns; ++j) w_row[j] = w[std::min(j, columns - 1)];  // a missing row repeats the last one
#pragma GCC unroll 4
  for (int i = 0; i < Rows; ++i) {
    a_row[i] = a[i];
#pragma GCC unroll 8
    for (int j = 0; j < Columns; ++j) tile[i][j] = part.first ? Vec<Real>{} : load(sums + (i * Columns + j) * n);
  }
  const auto step = [&](int64_t x, auto load_w) __attribute__((always_inline)) {
    Vec<Real> a_parts[Rows][kParts], w_parts[kParts];
#pragma GCC unroll 4
    for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 2
      for (int p = 0; p < kParts; ++p) a_parts[i][p] = in_register(load(a_row[i] + x / kDotPacking<Storage> + p * n));
    }
#pragma GCC unroll 8
    for (int j = 0; j < Columns; ++j) {
      load_w(w_row[j] + x, w_parts);
#pragma GCC unroll 2
      for (int p = 0; p < kParts; ++p) {
#pragma GCC unroll 4
        for (int i = 0; i < Rows; ++i) {
          if constexpr (kDotPacking<Storage> == 2) {
            tile[i][j] = add_pairs(tile[i][j], a_parts[i][p], w_parts[p]);
          } else {
            tile[i][j] += a_parts[i][p] * w_parts[p];
          }
        }
      }
    }
  };
  int64_t x = 0;
#pragma GCC unroll 1
  for (; x + kStep <= k; x += kStep) {
    step(x, [ahead](const Storage* p, auto& parts) __attribute__((always_inline)) {
      if (ahead != 0) fetch_early(p + ahead);
      load_step(p, parts);
    });
  }
  if (const int64_t rest = k - x; rest > 0) {
    step(x, [rest](const Storage* p, auto& parts) { load_first_of_step(p, rest, parts); });
  }
  if (!part.last) {
#pragma GCC unroll 4
    for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < Columns; ++j) store(sums + (i * Columns + j) * n, tile[i][j]);
    }
    return;
  }
  // The totals of n accumulators at a time.
  constexpr int kSums = Rows * Columns, kGroups = (kSums + n - 1) / n;
  Real totals[kGroups * n];
#pragma GCC unroll 16
  for (int g = 0; g < kGroups; ++g) {
    Vec<Real> group[n];
#pragma GCC unroll 16
    for (int l = 0; l < n; ++l) {
      const int at = g * n + l;
      group[l] = at < kSums ? tile[at / Columns][at % Columns] : Vec<Real>{};
    }
    sum_lanes<Real>(group);
    store(totals + g * n, group[0]);
  }
  for (int i = 0; i < Rows; ++i) {
    for (int j = 0; j < columns; ++j) c[i * ldc + j * stride] = totals[i * Columns + j];
  }
}

template <typename Storage>
void dot(int rows, int columns, const Wide<Storage>* const* a, const Storage* const* w, int64_t k, Wide<Storage>* sums,
         DotPart part, Wide<Storage>* c, int64_t ldc, int64_t stride, int64_t ahead) {
  static_assert(kMaxDotRows == 4, "one case per number of rows");
  const auto run = [&]<int Rows>() {
    // Beside tiles of all rows, a tile of fewer has no more columns than they.
    constexpr int kNarrow = kDotColumns<Storage, kMaxDotRows>;
    columns <= kNarrow
        ? dot_tile<Storage, Rows, kNarrow>(columns, a, w, k, sums, part, c, ldc, stride, ahead)
        : dot_tile<Storage, Rows, kDotColumns<Storage, Rows>>(columns, a, w, k, sums, part, c, ldc, stride, ahead);
  };
  switch (rows) {
    case 1:
      return run.template operator()<1>();
    case 2:
      return run.template operator()<2>();
    case 3:
      return run.template operator()<3>();
    case 4:
      return run.template operator()<4>();
  }
}

}  // namespace moe::MOE_ISA
