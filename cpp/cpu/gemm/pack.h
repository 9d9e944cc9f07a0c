// Packing: rows, gathered by pointer, into the panels that `outer` reads, widened on the way.
#pragma once

#include <algorithm>

#include "gemm/kernels.h"
#include "gemm/simd.h"

namespace moe::MOE_ISA {

template <typename Real, int Width = 1>
inline void transpose_square(Vec<Real> (&v)[kLanes<Real>]) {
  constexpr int n = kLanes<Real>;
  if constexpr (Width < n) {
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) {
      if ((i & Width) == 0) swap_blocks<Real, Width>(v[i], v[i + Width], std::make_integer_sequence<int, n>{});
    }
    transpose_square<Real, 2 * Width>(v);
  }
}

// Where packing reads: rows of numbers, or pairs of rows of BFloat16, whose elements face each other in a Real.
template <typename Storage>
struct SingleRows {
  const Storage* const* rows;

  Vec<Wide<Storage>> load(int64_t row, int64_t at) const { return MOE_ISA::load(rows[row] + at); }
  Vec<Wide<Storage>> load_first(int64_t row, int64_t at, int64_t n) const {
    return MOE_ISA::load_first(rows[row] + at, n);
  }
  void fetch(int64_t row, int64_t at) const { MOE_ISA::fetch(rows[row] + at); }
};

struct PairedRows {
  const BFloat16* const* rows;
  int64_t count;  // of an odd number, the last row faces zeros

  Vec<float> load(int64_t pair, int64_t at) const {
    return load_zipped(rows[2 * pair] + at, has_second(pair) ? rows[2 * pair + 1] + at : nullptr);
  }
  Vec<float> load_first(int64_t pair, int64_t at, int64_t n) const {
    BFloat16 first[kLanes<float>] = {}, second[kLanes<float>] = {};
    std::memcpy(first, rows[2 * pair] + at, static_cast<size_t>(n) * sizeof(BFloat16));
    if (has_second(pair)) std::memcpy(second, rows[2 * pair + 1] + at, static_cast<size_t>(n) * sizeof(BFloat16));
    return load_zipped(first, second);
  }
  void fetch(int64_t pair, int64_t at) const {
    MOE_ISA::fetch(rows[2 * pair] + at);
    if (has_second(pair)) MOE_ISA::fetch(rows[2 * pair + 1] + at);
  }

 private:
  bool has_second(int64_t pair) const { return 2 * pair + 1 < count; }
};

// q[x, i] = rows[i][x] for i < m; columns m .. width - 1 are zero. `width` is a multiple of kNarrowLanes.
template <typename Real, typename Rows>
void pack_transposed_from(const Rows& rows, int64_t m, int64_t k, int64_t width, Real* q) {
  constexpr int n = kLanes<Real>;
  for (int64_t i0 = 0; i0 < width; i0 += n) {
    const int64_t used = std::clamp<int64_t>(m - i0, 0, n);
    for (int64_t x = 0; x < k; x += n) {
      const int64_t rest = std::min<int64_t>(k - x, n);
      Vec<Real> square[n];
#pragma GCC unroll 16
      for (int i = 0; i < n; ++i) {
        square[i] = i >= used ? Vec<Real>{} : rest == n ? rows.load(i0 + i, x) : rows.load_first(i0 + i, x, rest);
      }
      transpose_square<Real>(square);
      if (width - i0 < n) {
        for (int64_t i = 0; i < rest; ++i) store_first(q + (x + i) * width + i0, square[i], kNarrowLanes<Real>);
      } else if (rest == n) {
#pragma GCC unroll 16
        for (int i = 0; i < n; ++i) store(q + (x + i) * width + i0, square[i]);
      } else {
        for (int64_t i = 0; i < rest; ++i) store(q + (x + i) * width + i0, square[i]);
      }
    }
  }
}

template <typename Storage>
void pack_transposed(const Storage* const* rows, int64_t m, int64_t k, int64_t width, Wide<Storage>* q) {
  pack_transposed_from(SingleRows<Storage>{rows}, m, k, width, q);
}
inline void pack_pairs_transposed(const BFloat16* const* rows, int64_t m, int64_t k, int64_t width, float* q) {
  pack_transposed_from(PairedRows{rows, m}, (m + 1) / 2, k, width, q);
}

// Panels [k, width] of the columns of row x < k, the last one padded with zeros. `width` is a multiple of kLanes. The
// rows are pieces of longer ones, which the processor's prefetcher does not follow: each is fetched while an earlier
// one is packed.
template <typename Real, typename Rows>
void pack_from(const Rows& rows, int64_t k, int64_t n, int64_t width, Real* q) {
  constexpr int64_t kRowsAhead = 4;
  for (int64_t x = 0; x < k; ++x) {
    Real* out = q + x * width;
    const int64_t later = std::min(x + kRowsAhead, k - 1);
    for (int64_t begin = 0; begin < n; begin += width, out += k * width) {
      const int64_t used = std::min(width, n - begin);
      int64_t j = 0;
      for (; j + kLanes<Real> <= used; j += kLanes<Real>) {
        rows.fetch(later, begin + j);
        store(out + j, rows.load(x, begin + j));
      }
      if (j < used) store(out + j, rows.load_first(x, begin + j, used - j)), j += kLanes<Real>;
      for (; j < width; j += kLanes<Real>) store(out + j, Vec<Real>{});
    }
  }
}

template <typename Storage>
void pack(const Storage* const* rows, int64_t k, int64_t n, int64_t width, Wide<Storage>* q) {
  pack_from(SingleRows<Storage>{rows}, k, n, width, q);
}
inline void pack_pairs(const BFloat16* const* rows, int64_t k, int64_t n, int64_t width, float* q) {
  pack_from(PairedRows{rows, k}, (k + 1) / 2, n, width, q);
}

// dst[j, i] = src[i, j].
template <typename Real>
void transpose(const Real* src, int64_t ld_src, int64_t rows, int64_t columns, Real* dst, int64_t ld_dst) {
  constexpr int n = kLanes<Real>;
  for (int64_t i = 0; i < rows; i += n) {
    const int64_t high = std::min<int64_t>(rows - i, n);
    for (int64_t j = 0; j < columns; j += n) {
      const int64_t wide = std::min<int64_t>(columns - j, n);
      if (high < n || wide < n) {
        for (int64_t a = 0; a < high; ++a) {
          for (int64_t b = 0; b < wide; ++b) dst[(j + b) * ld_dst + i + a] = src[(i + a) * ld_src + j + b];
        }
        continue;
      }
      Vec<Real> square[n];
#pragma GCC unroll 16
      for (int a = 0; a < n; ++a) square[a] = load(src + (i + a) * ld_src + j);
      transpose_square<Real>(square);
#pragma GCC unroll 16
      for (int b = 0; b < n; ++b) store(dst + (j + b) * ld_dst + i, square[b]);
    }
  }
}

}  // namespace moe::MOE_ISA
