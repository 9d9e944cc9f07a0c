// Dot products of a few rows with one row of the weight after another: c[i, j] = <a[i], w[j]>.
//
// From as many rows on as dot.h leaves, for the sizes at which multiplying takes about as long as reading: both go on
// side by side only while what is multiplied lies in the first-level cache already. The rows of the weight are
// therefore one long stream, fetched in three steps: twice into the second-level cache, since a core that asks for more
// than it can keep under way drops what is too much, and once into the first. Several streams with one fetch, as of one
// and two rows, get nine tenths of this speed at three rows, three quarters at four.
#pragma once

#include <algorithm>

#include "gemm/dot.h"

namespace moe::MOE_ISA {

inline constexpr int64_t kNearBytes = 1024, kAheadBytes = 8192;

// Where the stream goes on: after the end of this row, one step of the fetches ahead, and two.
template <typename Storage>
struct Upcoming {
  const Storage *next, *ahead, *far_ahead;
};

// Of few rows, two sums along k in turn hide how long one addition takes; of more, some columns share what is loaded of
// the rows: two, since each is one more stream from memory. Where a weight has to be widened, multiplying takes longer
// than reading sooner: as many as there are registers for.
template <typename Storage>
inline constexpr bool kDotWidens = sizeof(Storage) * kDotPacking<Storage> < sizeof(Wide<Storage>);
template <typename Storage>
inline constexpr int kMostRowsOfOneColumn = !kDotWidens<Storage>     ? kFewDotRows
                                            : MOE_ACCUMULATORS >= 24 ? 2
                                                                     : 3;
template <typename Storage, int Rows>
inline constexpr int kStreamColumns =
    Rows > kMostRowsOfOneColumn<Storage>
        ? std::clamp((MOE_ACCUMULATORS - (kDotParts<Storage> == 2 ? 4 : 0)) / Rows, 1, kDotWidens<Storage> ? 4 : 2)
        : 1;

// sums[j * Rows + i] = <a[i], w[j]>, lane by lane, for the `columns` columns of a tile. A missing one repeats the last
// one.
template <typename Storage, int Rows>
void dot_columns(const Wide<Storage>* a, const Storage* w, int64_t columns, int64_t k,
                 const Upcoming<Storage>& upcoming, int64_t stride, Vec<Wide<Storage>>* sums) {
  using Real = Wide<Storage>;
  constexpr int n = kLanes<Real>, kParts = kDotParts<Storage>, kColumns = kStreamColumns<Storage, Rows>;
  constexpr int kUnroll = Rows > kFewDotRows || kColumns > 1 ? 1 : 2;
  constexpr int64_t kStep = kDotStep<Storage>, kStride = kUnroll * kStep;
  constexpr int64_t kLine = kCacheLine / sizeof(Storage), kNear = kNearBytes / sizeof(Storage);
  const Storage* column[kColumns];
  Vec<Real> total[Rows][kColumns][kUnroll] = {};
#pragma GCC unroll 4
  for (int j = 0; j < kColumns; ++j) column[j] = w + std::min<int64_t>(j, columns - 1) * stride;
  const auto step = [&](int64_t x, int u, auto load_w) __attribute__((always_inline)) {
    Vec<Real> w_parts[kColumns][kParts];
#pragma GCC unroll 4
    for (int j = 0; j < kColumns; ++j) load_w(column[j] + x, w_parts[j]);
#pragma GCC unroll 2
    for (int p = 0; p < kParts; ++p) {
#pragma GCC unroll 8
      for (int i = 0; i < Rows; ++i) {
        Vec<Real> a_part = load(a + ((u * Rows + i) * kParts + p) * n);
        if (kColumns > 1) a_part = in_register(a_part);
#pragma GCC unroll 4
        for (int j = 0; j < kColumns; ++j) {
          Vec<Real>& sum = total[i][j][u];
          if constexpr (kDotPacking<Storage> == 2) {
            sum = add_pairs(sum, a_part, w_parts[j][p]);
          } else {
            sum += a_part * w_parts[j][p];
          }
        }
      }
    }
  };
  const auto whole = [](const Storage* p, auto& parts) __attribute__((always_inline)) { load_step(p, parts); };
  int64_t x = 0;
  // Up to `end`, with the nearest fetch at near + x.
  const auto run = [&](int64_t end, const Storage* near) __attribute__((always_inline)) {
#pragma GCC unroll 1
    for (; x + kStride <= end; x += kStride) {
#pragma GCC unroll 4
      for (int64_t line = 0; line < kStride; line += kLine) {
#pragma GCC unroll 4
        for (int j = 0; j < kColumns; ++j) {
          const int64_t at = j * stride + x + line;
          fetch_early(upcoming.far_ahead + at);
          fetch_early(upcoming.ahead + at);
          fetch(near + at);
        }
      }
#pragma GCC unroll 2
      for (int u = 0; u < kUnroll; ++u) step(x + u * kStep, u, whole);
      a += kUnroll * Rows * kParts * n;
    }
  };
  run(k - kNear, w + kNear);
  run(k, upcoming.next + kNear - k);
  if (kUnroll > 1 && x + kStep <= k) {
    step(x, 0, whole);
    x += kStep;
    a += Rows * kParts * n;
  }
  if (const int64_t rest = k - x; rest > 0) {
    step(x, 0, [rest](const Storage* p, auto& parts) { load_first_of_step(p, rest, parts); });
  }
#pragma GCC unroll 4
  for (int j = 0; j < kColumns; ++j) {
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) {
      sums[j * Rows + i] = kUnroll > 1 ? total[i][j][0] + total[i][j][kUnroll - 1] : total[i][j][0];
    }
  }
}

template <typename Storage, int Rows>
void dot_stream_of(int64_t columns, const Wide<Storage>* a, const Storage* w, int64_t stride, int64_t k,
                   const Storage* next, Wide<Storage>* c, int64_t ldc, TileStore how) {
  using Real = Wide<Storage>;
  constexpr int n = kLanes<Real>, kTile = kStreamColumns<Storage, Rows>;
  // The sums of as many columns as make n of them are added up together.
  constexpr int kColumns = std::max(n / (Rows * kTile), 1) * kTile;
  constexpr int kGroups = (kColumns * Rows + n - 1) / n;
  const int64_t row_bytes = std::max<int64_t>(k, 1) * static_cast<int64_t>(sizeof(Storage));
  const int64_t ahead = (kAheadBytes + row_bytes - 1) / row_bytes;
  if (next == nullptr) next = w;
  const auto row = [&](int64_t j) { return j < columns ? w + j * stride : next + (j - columns) * stride; };
  Vec<Real> sums[kGroups][n] = {};
  Real totals[kGroups * n];
  for (int64_t first = 0; first < columns; first += kColumns) {
    const int64_t count = std::min<int64_t>(kColumns, columns - first);
    for (int64_t j = 0; j < count; j += kTile) {
      const int64_t at = first + j;
      const Upcoming<Storage> upcoming{row(at + kTile), row(at + ahead), row(at + 2 * ahead)};
      dot_columns<Storage, Rows>(a, w + at * stride, count - j, k, upcoming, stride, &sums[0][0] + j * Rows);
    }
    for (int g = 0; g < kGroups; ++g) {
      Vec<Real> together[n];
      std::copy_n(sums[g], n, together);
      sum_lanes<Real>(together);
      store(totals + g * n, together[0]);
    }
    for (int64_t j = 0; j < count; ++j) {
      for (int i = 0; i < Rows; ++i) {
        Real& out = c[i * ldc + first + j];
        out = (how == TileStore::kAdd ? out : Real(0)) + totals[j * Rows + i];
      }
    }
  }
}

template <typename Storage>
void dot(int rows, int64_t columns, const Wide<Storage>* a, const Storage* w, int64_t stride, int64_t k,
         const Storage* next, Wide<Storage>* c, int64_t ldc, TileStore how) {
  static_assert(kMaxDotRows == 8, "one function per number of rows");
  // Two rows are read as one is, where registers hold the sums of both.
  static constexpr decltype(&dot_runs<Storage, 1>) kOfRows[] = {
      dot_runs<Storage, 1>,      kMostRowsOfRuns > 1 ? dot_runs<Storage, kMostRowsOfRuns> : dot_stream_of<Storage, 2>,
      dot_stream_of<Storage, 3>, dot_stream_of<Storage, 4>,
      dot_stream_of<Storage, 5>, dot_stream_of<Storage, 6>,
      dot_stream_of<Storage, 7>, dot_stream_of<Storage, 8>};
  kOfRows[rows - 1](columns, a, w, stride, k, next, c, ldc, how);
}

}  // namespace moe::MOE_ISA
