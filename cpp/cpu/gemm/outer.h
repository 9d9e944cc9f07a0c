// Outer-product micro-kernel: c[i, j] (+)= sum over x of p[i][x] * q[x, j].
//
// A tile of `Rows` x `Vectors` vectors, and perhaps a narrow one at the end of each row, stays in registers over all of
// k. Per step it loads `Vectors` vectors of q, which is packed, and broadcasts `Rows` numbers of p, which is read where
// it lies. 6 x 4 costs 10 loads for 24 FMAs.
#pragma once

#include "gemm/kernels.h"
#include "gemm/simd.h"

namespace moe::MOE_ISA {

// c + ldc, where the compiler cannot see that: it would compute the addresses of all vectors of a tile before the first
// product, and keep them on the stack. A third of the time of a tile of eight products.
template <typename Real>
__attribute__((always_inline)) inline Real* next_row(Real* c, int64_t ldc) {
  c += ldc;
  asm("" : "+r"(c));
  return c;
}

// One piece of a tile's width: `Rows` x `Vectors` vectors of `Bytes`.
template <typename Real, bool Pairs, int Rows, int Vectors, int Bytes>
struct TilePart {
  using Wider = VectorOf<Real, Bytes>;
  using V = typename Wider::Type;
  static constexpr int kLanes = Wider::kLanes;
  V sums[Rows][Vectors > 0 ? Vectors : 1];
  V column[Vectors > 0 ? Vectors : 1];

  static V load(const Real* p) { return *reinterpret_cast<const typename Wider::Unaligned*>(p); }
  static V broadcast(const Real* p) {
    if constexpr (Pairs) {
      return broadcast_pair<V>(p);
    } else {
      return *p - V{};
    }
  }
  void begin(const Real* c, int64_t ldc, bool add) {
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i, c = next_row(c, ldc)) {
#pragma GCC unroll 4
      for (int j = 0; j < Vectors; ++j) sums[i][j] = add ? load(c + j * kLanes) : V{};
    }
  }
  __attribute__((always_inline)) void read(const Real* q) {
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) column[j] = in_register(load(q + j * kLanes));
  }
  __attribute__((always_inline)) void add(int i, V element) {
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) {
      if constexpr (Pairs) {
        sums[i][j] = add_pairs(sums[i][j], element, column[j]);
      } else {
        sums[i][j] += element * column[j];
      }
    }
  }
  void end(Real* c, int64_t ldc, bool past_caches) const {
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i, c = next_row(c, ldc)) {
#pragma GCC unroll 4
      for (int j = 0; j < Vectors; ++j) {
        Real* out = c + j * kLanes;
        if constexpr (Bytes == MOE_VECTOR_BYTES) {
          past_caches ? stream(out, sums[i][j]) : store(out, sums[i][j]);
        } else {
          *reinterpret_cast<typename Wider::Unaligned*>(out) = sums[i][j];
        }
      }
    }
  }
};

template <bool Twice = false>
__attribute__((always_inline)) inline void fetch_step(Fetch& fetch) {
  const auto line = [&fetch](int64_t l) __attribute__((always_inline)) {
    fetch_early(fetch.at + l * kCacheLine);
    if constexpr (Twice) fetch_early(fetch.at + l * kCacheLine + fetch.again);
  };
  line(0);
  if (fetch.lines > 1) line(1);
  if (fetch.lines > 2) line(2);
  if (fetch.lines > 3) line(3);
  fetch.at += fetch.lines * kCacheLine;
  if (--fetch.left == 0) {
    fetch.at += fetch.skip;
    fetch.left = fetch.steps;
  }
}

template <typename Real, bool Pairs, int Rows, int Vectors, int Narrow>
void outer_tile(const Real* const* p, const Real* q, int64_t ldq, int64_t k, Real* c, int64_t ldc, TileStore how,
                Fetch fetch) {
  constexpr int kWide = Vectors * kLanes<Real>;
  TilePart<Real, Pairs, Rows, Vectors, MOE_VECTOR_BYTES> wide;
  TilePart<Real, Pairs, Rows, Narrow, kNarrowBytes> narrow;
  const Real* row[Rows];
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i) row[i] = p[i];
  wide.begin(c, ldc, how == TileStore::kAdd);
  narrow.begin(c + kWide, ldc, how == TileStore::kAdd);
  const auto step = [&](int64_t x) __attribute__((always_inline)) {
    wide.read(q);
    narrow.read(q + kWide);
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) {
      if constexpr (Vectors > 0) {
        // One vector of q uses each element once: there the broadcast is best left to the multiplication.
        const Vec<Real> broadcast = wide.broadcast(row[i] + x);
        const Vec<Real> element = Vectors + Narrow > 1 ? in_register(broadcast) : broadcast;
        wide.add(i, element);
        if constexpr (Narrow > 0) {
          typename VectorOf<Real, kNarrowBytes>::Type low;
          std::memcpy(&low, &element, sizeof(low));
          narrow.add(i, low);
        }
      } else {
        narrow.add(i, narrow.broadcast(row[i] + x));
      }
    }
  };
  // A loop for each: what a fetch needs would push pointers of rows out of the registers where there is none.
  const auto run = [&](const auto& fetch_next) __attribute__((always_inline)) {
#pragma GCC unroll 1
    for (int64_t x = 0; x < k; ++x, q += ldq) {
      fetch_next();
      step(x);
    }
  };
  if (fetch.at == nullptr) {
    run([]() __attribute__((always_inline)) {});
  } else if (fetch.again == 0) {
    run([&]() __attribute__((always_inline)) { fetch_step(fetch); });
  } else {
    run([&]() __attribute__((always_inline)) { fetch_step<true>(fetch); });
  }
  wide.end(c, ldc, how == TileStore::kStream);
  narrow.end(c + kWide, ldc, false);
}

template <typename Real, bool Pairs, int Rows>
void outer_rows(int width, const Real* const* p, const Real* q, int64_t ldq, int64_t k, Real* c, int64_t ldc,
                TileStore how, Fetch fetch) {
  const int vectors = width / kLanes<Real>;
  const auto run = [&]<int Vectors, int Narrow>() {
    if constexpr (Rows * (Vectors + Narrow) <= MOE_ACCUMULATORS && Vectors + Narrow <= MOE_TILE_VECTORS &&
                  Vectors + Narrow > 0) {
      outer_tile<Real, Pairs, Rows, Vectors, Narrow>(p, q, ldq, k, c, ldc, how, fetch);
    }
  };
  const auto run_vectors = [&]<int Narrow>() {
    switch (vectors) {
      case 0:
        return run.template operator()<0, Narrow>();
      case 1:
        return run.template operator()<1, Narrow>();
      case 2:
        return run.template operator()<2, Narrow>();
      case 3:
        return run.template operator()<3, Narrow>();
      case 4:
        return run.template operator()<4, Narrow>();
    }
  };
  if constexpr (kNarrowBytes < MOE_VECTOR_BYTES) {
    if (width % kLanes<Real> != 0) return run_vectors.template operator()<1>();
  }
  run_vectors.template operator()<0>();
}

template <typename Real, bool Pairs>
void outer(int rows, int width, const Real* const* p, const Real* q, int64_t ldq, int64_t k, Real* c, int64_t ldc,
           TileStore how, Fetch fetch) {
  static_assert(kMaxTileRows == 8 && MOE_TILE_VECTORS <= kMaxTileVectors, "one case per number of rows and vectors");
  switch (rows) {
    case 1:
      return outer_rows<Real, Pairs, 1>(width, p, q, ldq, k, c, ldc, how, fetch);
    case 2:
      return outer_rows<Real, Pairs, 2>(width, p, q, ldq, k, c, ldc, how, fetch);
    case 3:
      return outer_rows<Real, Pairs, 3>(width, p, q, ldq, k, c, ldc, how, fetch);
    case 4:
      return outer_rows<Real, Pairs, 4>(width, p, q, ldq, k, c, ldc, how, fetch);
    case 5:
      return outer_rows<Real, Pairs, 5>(width, p, q, ldq, k, c, ldc, how, fetch);
    case 6:
      return outer_rows<Real, Pairs, 6>(width, p, q, ldq, k, c, ldc, how, fetch);
    case 7:
      return outer_rows<Real, Pairs, 7>(width, p, q, ldq, k, c, ldc, how, fetch);
    case 8:
      return outer_rows<Real, Pairs, 8>(width, p, q, ldq, k, c, ldc, how, fetch);
  }
}

}  // namespace moe::MOE_ISA
