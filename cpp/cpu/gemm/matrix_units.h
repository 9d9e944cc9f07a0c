// What a processor's matrix units offer for BFloat16, beside the vectors of its instruction set.
//
//   c[i, j] (+)= sum over x < k of a[i, x] * b[x, j],  in fp32
//
// a is read where it lies, row by row. b is packed: per group of 16 columns [k / 32][16 pairs of x][16 columns][2], so
// that one tile is 16 whole cache lines. k is a multiple of 32.
#pragma once

#include <cstdint>

#include "convert.h"

namespace moe {

struct MatrixUnits {
  static constexpr int64_t kDepth = 32;    // k of one tile
  static constexpr int64_t kColumns = 16;  // of one group of b
  static constexpr int64_t kRows = 32;     // of a, in one call at most

  // c is [rows, 16 * groups], rows <= kRows; lda and ldc in elements.
  void (*multiply)(const BFloat16* a, int64_t lda, int64_t rows, const BFloat16* b, int64_t groups, int64_t k, float* c,
                   int64_t ldc, bool add);
  // b[x, j] = rows[j][x] for j < n; the other columns of the last group are zero.
  void (*pack_columns)(const BFloat16* const* rows, int64_t n, int64_t k, BFloat16* b);
  // b[x, j] = rows[x][j] for x < k and j < n; what pads k and n is zero. Groups are `stride` elements apart.
  void (*pack_rows)(const BFloat16* const* rows, int64_t k, int64_t n, int64_t stride, BFloat16* b);
  // a[i, x] = rows[x][i] for i < m and x < k; a is [m padded to 16, lda], zero where k is padded.
  void (*pack_transposed)(const BFloat16* const* rows, int64_t k, int64_t m, BFloat16* a, int64_t lda);
};

}  // namespace moe
