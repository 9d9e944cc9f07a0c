// Outer-product micro-kernel: c[i, j] (+)= sum over x of p[i][x] * q[x, j].
//
// A tile of `Rows` x `Vectors` vectors stays in registers over all of k. Per step it loads `Vectors` vectors of q,
// which is packed, and broadcasts `Rows` numbers of p, which is read where it lies. 6 x 4 costs 10 loads for 24 FMAs.
#pragma once

#include "gemm/kernels.h"
#include "gemm/simd.h"

namespace moe::MOE_ISA {

template <typename Real, int Rows, int Vectors>
void outer_tile(const Real* const* p, const Real* q, int64_t ldq, int64_t k, Real* c, int64_t ldc, TileStore how) {
  const Real* row[Rows];
  Vec<Real> tile[Rows][Vectors];
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i) {
    row[i] = p[i];
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j)
      tile[i][j] = how == TileStore::kAdd ? load(c + i * ldc + j * kLanes<Real>) : Vec<Real>{};
  }
#pragma GCC unroll 1
  for (int64_t x = 0; x < k; ++x, q += ldq) {
    Vec<Real> column[Vectors];
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) column[j] = in_register(load(q + j * kLanes<Real>));
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) {
      // One vector of q uses each element once: there the broadcast is best left to the multiplication.
      const Vec<Real> element = Vectors > 1 ? in_register(broadcast(row[i][x])) : broadcast(row[i][x]);
#pragma GCC unroll 4
      for (int j = 0; j < Vectors; ++j) tile[i][j] += element * column[j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) {
      Real* out = c + i * ldc + j * kLanes<Real>;
      how == TileStore::kStream ? stream(out, tile[i][j]) : store(out, tile[i][j]);
    }
  }
}

template <typename Real, int Rows>
void outer_rows(int vectors, const Real* const* p, const Real* q, int64_t ldq, int64_t k, Real* c, int64_t ldc,
                TileStore how) {
  const auto run = [&]<int Vectors>() {
    if constexpr (Rows * Vectors <= MOE_ACCUMULATORS && Vectors <= MOE_TILE_VECTORS) {
      outer_tile<Real, Rows, Vectors>(p, q, ldq, k, c, ldc, how);
    }
  };
  switch (vectors) {
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

template <typename Real>
void outer(int rows, int vectors, const Real* const* p, const Real* q, int64_t ldq, int64_t k, Real* c, int64_t ldc,
           TileStore how) {
  static_assert(kMaxTileRows == 8 && MOE_TILE_VECTORS <= kMaxTileVectors, "one case per number of rows and vectors");
  switch (rows) {
    case 1:
      return outer_rows<Real, 1>(vectors, p, q, ldq, k, c, ldc, how);
    case 2:
      return outer_rows<Real, 2>(vectors, p, q, ldq, k, c, ldc, how);
    case 3:
      return outer_rows<Real, 3>(vectors, p, q, ldq, k, c, ldc, how);
    case 4:
      return outer_rows<Real, 4>(vectors, p, q, ldq, k, c, ldc, how);
    case 5:
      return outer_rows<Real, 5>(vectors, p, q, ldq, k, c, ldc, how);
    case 6:
      return outer_rows<Real, 6>(vectors, p, q, ldq, k, c, ldc, how);
    case 7:
      return outer_rows<Real, 7>(vectors, p, q, ldq, k, c, ldc, how);
    case 8:
      return outer_rows<Real, 8>(vectors, p, q, ldq, k, c, ldc, how);
  }
}

}  // namespace moe::MOE_ISA
