// Dot products straight on the row-major weight: how both factors are read along k, by whole vectors, and the kernel
// for one or two rows. Nothing of the weight is packed, and each element comes from memory once. dot_stream.h has more
// rows.
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
void arrange_for_dot(const Storage* src, int64_t n, Wide<Storage>* dst, int64_t stride) {
  constexpr int kStep = kDotStep<Storage>, kParts = kDotParts<Storage>;
  Vec<Wide<Storage>> parts[kParts];
  for (int64_t x = 0; x < n; x += kStep, dst += stride) {
    n - x < kStep ? load_first_of_step(src + x, n - x, parts) : load_step(src + x, parts);
#pragma GCC unroll 2
    for (int part = 0; part < kParts; ++part) store(dst + part * kLanes<Wide<Storage>>, parts[part]);
  }
}

// Streams of the weight that the kernel below reads side by side, and the most rows that leave registers for them.
inline constexpr int kRuns = 8;
inline constexpr int kMostRowsOfRuns = 2 * kRuns <= MOE_ACCUMULATORS ? 2 : 1;

// c[i, j] = <a[i], w[j]>. Multiplying takes little time here, so all is about reading: the columns are cut into runs,
// each one stream to the end, which a processor's own prefetcher follows and which is fetched a fixed distance ahead.
// Where the streams end, they fetch what those of the next call will begin with.
template <typename Storage, int Rows>
void dot_runs(int64_t columns, const Wide<Storage>* a, const Storage* w, int64_t stride, int64_t k, const Storage* next,
              Wide<Storage>* c, int64_t ldc, TileStore how) {
  using Real = Wide<Storage>;
  constexpr int n = kLanes<Real>, kParts = kDotParts<Storage>, kTile = Rows * kRuns;
  constexpr int64_t kStep = kDotStep<Storage>, kAhead = 2048 / sizeof(Storage);
  // The sums of as many columns as make n of them are added up together.
  constexpr int kTogether = std::max(n / kTile, 1), kGroups = (kTogether * kTile + n - 1) / n;
  const int64_t length = (columns + kRuns - 1) / kRuns, ahead = std::min(kAhead, k);
  // From the end of a stream to where the next call's begins.
  const int64_t beyond = next == nullptr ? 0 : next - w - length * stride;
  Vec<Real> sums[kGroups * n] = {};
  for (int64_t first = 0; first < length; first += kTogether) {
    const int64_t together = std::min<int64_t>(kTogether, length - first);
    for (int64_t j = first; j < first + together; ++j) {
      const Storage* stream[kRuns];
#pragma GCC unroll 8
      for (int s = 0; s < kRuns; ++s) {  // a missing column repeats the last one
        stream[s] = w + std::min(s * length + j, columns - 1) * stride;
      }
      Vec<Real> total[kRuns][Rows] = {};
      const auto step = [&](int64_t x, auto load_w) __attribute__((always_inline)) {
        Vec<Real> a_parts[Rows][kParts], w_parts[kParts];
#pragma GCC unroll 2
        for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 2
          for (int p = 0; p < kParts; ++p) {
            a_parts[i][p] = in_register(load(a + x / kDotPacking<Storage> * Rows + (i * kParts + p) * n));
          }
        }
#pragma GCC unroll 8
        for (int s = 0; s < kRuns; ++s) {
          load_w(stream[s] + x, w_parts);
#pragma GCC unroll 2
          for (int p = 0; p < kParts; ++p) {
#pragma GCC unroll 2
            for (int i = 0; i < Rows; ++i) {
              if constexpr (kDotPacking<Storage> == 2) {
                total[s][i] = add_pairs(total[s][i], a_parts[i][p], w_parts[p]);
              } else {
                total[s][i] += a_parts[i][p] * w_parts[p];
              }
            }
          }
        }
      };
      int64_t x = 0;
      // Up to `end`, with fetches `distance` further.
      const auto run = [&](int64_t end, int64_t distance) __attribute__((always_inline)) {
#pragma GCC unroll 1
        for (; x + kStep <= end; x += kStep) {
          step(x, [distance](const Storage* p, auto& parts) __attribute__((always_inline)) {
            fetch_early(p + distance);
            load_step(p, parts);
          });
        }
      };
      run(k - ahead, ahead);
      run(k, ahead + stride - k + (j + 1 == length ? beyond : 0));
      if (const int64_t rest = k - x; rest > 0) {
        step(x, [rest](const Storage* p, auto& parts) { load_first_of_step(p, rest, parts); });
      }
      Vec<Real>* sum = sums + (j - first) * kTile;
#pragma GCC unroll 8
      for (int s = 0; s < kRuns; ++s) {
#pragma GCC unroll 2
        for (int i = 0; i < Rows; ++i) sum[s * Rows + i] = total[s][i];
      }
    }
    Real totals[kGroups * n];
    for (int g = 0; g < kGroups; ++g) {
      Vec<Real> group[n];
      std::copy_n(sums + g * n, n, group);
      sum_lanes<Real>(group);
      store(totals + g * n, group[0]);
    }
    for (int64_t j = 0; j < together; ++j) {
      for (int64_t s = 0, at = first + j; s < kRuns && at < columns; ++s, at += length) {
        for (int i = 0; i < Rows; ++i) {
          Real& out = c[i * ldc + at];
          out = (how == TileStore::kAdd ? out : Real(0)) + totals[(j * kRuns + s) * Rows + i];
        }
      }
    }
  }
}

}  // namespace moe::MOE_ISA
