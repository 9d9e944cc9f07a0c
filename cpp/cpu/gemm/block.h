// One block of a grouped GEMM: some rows of one expert against some columns of its weight, in Real.
//
//   c[i, j] = sum over x < k of rows[i][x] * weight(j, x)
//
// Three ways, chosen by the layout of the weight and the number of rows alone, so that a result never depends on how
// the work was cut or on who did it (each c[i, j] is summed in the same order in every tile):
//   kDot             out_in, few rows: dot products along k, straight on the weight
//   kTokensInLanes   out_in, many rows: rows are packed, transposed, once; weight elements are broadcast, unpacked
//   kColumnsInLanes  in_out: a panel of the weight is packed; row elements are broadcast
#pragma once

#include <algorithm>
#include <type_traits>

#include "arena.h"
#include "gemm/kernels.h"
#include "moe/grouped_gemm.h"
#include "parallel.h"

namespace moe {

enum class GemmKernel : int8_t { kDot, kTokensInLanes, kColumnsInLanes };

// The most rows that dot products serve better than packed panels; benchmarks/bench_grouped_gemm.py shows both sides.
inline constexpr int64_t kMaxDotProductRows = 28;

inline GemmKernel choose_gemm(WeightLayout layout, int64_t rows) {
  if (layout == WeightLayout::kInOut) return GemmKernel::kColumnsInLanes;
  return rows <= kMaxDotProductRows ? GemmKernel::kDot : GemmKernel::kTokensInLanes;
}

constexpr WeightLayout transposed(WeightLayout layout) {
  return layout == WeightLayout::kOutIn ? WeightLayout::kInOut : WeightLayout::kOutIn;
}

// One expert's weight, [n, k] out_in or [k, n] in_out.
template <typename Storage>
struct Weight {
  const Storage* data;
  int64_t n, k;
  WeightLayout layout;
};

// Up to two runs of columns: the gate and the up columns of a block lie apart in the concat layout.
struct Columns {
  int64_t begin[2];
  int64_t count;  // in each run
  int runs;

  static constexpr int64_t kPadding = 16;  // run 1 starts in c on a multiple of this: no vector is wider
  int64_t offset(int run) const { return run * (ceil_div(count, kPadding) * kPadding); }
  int64_t width() const { return offset(runs); }  // columns of c, padding included
};

template <typename Storage>
class BlockGemm {
 public:
  using Real = Wide<Storage>;

  // Rows per block: as many as leave room for the other operand in the second-level cache, a block of k at a time.
  static int64_t max_rows(const Kernels<Storage>& kernels, int64_t k) {
    const auto rows_in = [](int64_t bytes, int64_t width) {
      return bytes / (std::max<int64_t>(width, 1) * static_cast<int64_t>(sizeof(Real)));
    };
    const int64_t panel = kernels.panel();
    const int64_t fit = std::min(rows_in(kCachedBytes, std::min(k, kTokensBlock)), rows_in(kPackedBytes, k));
    return std::clamp(fit / panel * panel, panel, 4 * panel);
  }

  // Scratch for blocks of up to `rows` rows, contracted width k, and c of up to `columns` columns.
  static size_t scratch_bytes(const Kernels<Storage>& kernels, int64_t rows, int64_t k, int64_t columns) {
    const int64_t panel = kernels.panel(), padded_rows = ceil_div(rows, panel) * panel;
    return Arena::size_of_block<Real>(packed_size(kernels, padded_rows, k)) +
           Arena::size_of_block<Real>(staged_size(kernels)) + Arena::size_of_block<Real>(padded_rows * columns) +
           Arena::size_of_block<const Real*>(rows);
  }

  BlockGemm(const Kernels<Storage>& kernels, Arena& arena, int64_t rows, int64_t k, int64_t columns)
      : kernels_(kernels) {
    const int64_t panel = kernels.panel(), padded_rows = ceil_div(rows, panel) * panel;
    packed_ = arena.take<Real>(packed_size(kernels, padded_rows, k));
    staged_ = arena.take<Real>(staged_size(kernels));
    transposed_ = arena.take<Real>(padded_rows * columns);
    real_rows_ = arena.take<const Real*>(rows);
  }

  // Makes m rows of width k ready for any number of calls of multiply. The pointers are not kept; the rows are.
  void load_rows(const Storage* const* rows, int64_t m, int64_t k, GemmKernel kernel) {
    m_ = m;
    k_ = k;
    kernel_ = kernel;
    if (kernel == GemmKernel::kTokensInLanes) {
      vectors_ = ceil_div(m, kernels_.lanes);
      panels_ = ceil_div(vectors_, kernels_.tile_vectors);
      for (int64_t p = 0; p < panels_; ++p) {
        const int64_t first = panel_begin(p) * kernels_.lanes, width = panel_begin(p + 1) * kernels_.lanes - first;
        kernels_.pack_transposed(rows + first, m - first, k, width, packed_ + first * k);
      }
      return;
    }
    if (kernel == GemmKernel::kDot) return pack_dot_rows(rows);
    for (int64_t i = 0; i < m; ++i) {
      if constexpr (std::is_same_v<Storage, Real>) {
        real_rows_[i] = rows[i];
      } else {
        kernels_.widen_row(rows[i], k, packed_ + i * k, 0);
        real_rows_[i] = packed_ + i * k;
      }
    }
  }

  // c[i * ldc + columns.offset(run) + j]; ldc >= columns.width(). Columns of padding hold anything.
  void multiply(const Weight<Storage>& weight, const Columns& columns, Real* c, int64_t ldc) {
    for (int run = 0; run < columns.runs; ++run) {
      Real* out = c + columns.offset(run);
      if (k_ == 0) {  // an empty sum, which no block of k would write
        for (int64_t i = 0; i < m_; ++i) std::fill_n(out + i * ldc, columns.count, Real(0));
        continue;
      }
      switch (kernel_) {
        case GemmKernel::kDot:
          multiply_dot(weight, columns.begin[run], columns.count, out, ldc);
          break;
        case GemmKernel::kTokensInLanes:
          multiply_tokens_in_lanes(weight, columns.begin[run], columns.count, out, ldc);
          break;
        case GemmKernel::kColumnsInLanes:
          multiply_columns_in_lanes(weight, columns.begin[run], columns.count, out, ldc);
          break;
      }
    }
  }

 private:
  static constexpr int64_t kCachedBytes = 512 << 10, kPackedBytes = 4 << 20;
  static constexpr int64_t kDotBlock = 1024, kTokensBlock = 512, kColumnsBlock = 256;
  static constexpr int64_t kStagedRow = std::max(kDotBlock, kTokensBlock);  // contracted elements at a time

  static int64_t packed_size(const Kernels<Storage>& kernels, int64_t padded_rows, int64_t k) {
    return padded_rows * k + kMaxDotProductRows * ceil_div(k, kDotBlock) * (kDotBlock + kernels.lanes);
  }
  static int64_t staged_size(const Kernels<Storage>& kernels) {
    return std::max<int64_t>(kMaxTileRows * (kStagedRow + kernels.lanes), kColumnsBlock * kernels.panel());
  }

  // Contracted elements at a time. Few rows: all, since the weight then comes from memory once. Else so many that a
  // block of all rows stays in the first-level cache.
  int64_t dot_block() const { return m_ <= kMaxDotRows ? k_ : kDotBlock; }
  // NOTE: a row is one cache line longer than its block: at a power of two, all rows would fall into the same cache
  // sets.
  int64_t dot_row_size() const { return std::min(k_, dot_block()) + kernels_.lanes; }

  // packed_: [blocks of k][m][dot_row_size]
  void pack_dot_rows(const Storage* const* rows) {
    Real* out = packed_;
    for (int64_t k0 = 0; k0 < k_; k0 += dot_block()) {
      const int64_t depth = std::min(dot_block(), k_ - k0);
      for (int64_t i = 0; i < m_; ++i, out += dot_row_size()) kernels_.widen_row(rows[i] + k0, depth, out, 0);
    }
  }

  void multiply_dot(const Weight<Storage>& weight, int64_t begin, int64_t count, Real* c, int64_t ldc) {
    // Whole tiles and a rest, not even tiles: a tile of fewer rows has more columns than the others can share.
    const int64_t tiles = ceil_div(m_, kMaxDotRows);
    const int64_t step = kernels_.dot_columns[std::min(m_, kMaxDotRows) - 1];
    const int64_t block = dot_block();
    const Storage* w[kMaxTileRows];
    const Real *a[kMaxDotRows], *staged[kMaxTileRows];
    const Real* packed = packed_;
    for (int64_t k0 = 0; k0 < k_; k0 += block, packed += m_ * dot_row_size()) {
      const int64_t depth = std::min(block, k_ - k0);
      for (int64_t j = 0; j < count; j += step) {
        const int64_t columns = std::min(step, count - j);
        for (int64_t x = 0; x < columns; ++x) w[x] = weight.data + (begin + j + x) * weight.k + k0;
        if (!std::is_same_v<Storage, Real> && tiles > 1) stage(w, columns, depth, step * weight.k, staged);
        for (int64_t t = 0; t < tiles; ++t) {
          const int64_t first = t * kMaxDotRows, rows = std::min(kMaxDotRows, m_ - first);
          for (int64_t x = 0; x < rows; ++x) a[x] = packed + (first + x) * dot_row_size();
          Real* out = c + first * ldc + j;
          if (!std::is_same_v<Storage, Real> && tiles > 1) {
            kernels_.dot_real(static_cast<int>(rows), static_cast<int>(columns), a, staged, depth, out, ldc, k0 > 0, 0);
          } else {
            kernels_.dot(static_cast<int>(rows), static_cast<int>(columns), a, w, depth, out, ldc, k0 > 0,
                         step * weight.k);
          }
        }
      }
    }
  }

  // The rows fill vectors_ vectors, shared among the panels as evenly as whole vectors allow: 145 rows are 4 + 3 + 3
  // vectors of 16, where three equal panels would compute 192 rows.
  int64_t panel_begin(int64_t panel) const { return vectors_ * panel / panels_; }

  // Widens a few rows of the weight, once for all the tiles that read them.
  void stage(const Storage* const* w, int64_t rows, int64_t depth, int64_t ahead, const Real** staged) {
    for (int64_t x = 0; x < rows; ++x) {
      Real* out = staged_ + x * (kStagedRow + kernels_.lanes);
      kernels_.widen_row(w[x], depth, out, ahead);
      staged[x] = out;
    }
  }

  void multiply_tokens_in_lanes(const Weight<Storage>& weight, int64_t begin, int64_t count, Real* c, int64_t ldc) {
    const int64_t ld = vectors_ * kernels_.lanes;
    const int64_t step = kernels_.tile_rows(ceil_div(vectors_, panels_));
    const Storage* w[kMaxTileRows];
    const Real* staged[kMaxTileRows];
    for (int64_t k0 = 0; k0 < k_; k0 += kTokensBlock) {
      const int64_t depth = std::min(kTokensBlock, k_ - k0);
      for (int64_t j = 0; j < count; j += step) {
        const int64_t rows = std::min(step, count - j);
        for (int64_t x = 0; x < rows; ++x) w[x] = weight.data + (begin + j + x) * weight.k + k0;
        if constexpr (std::is_same_v<Storage, Real>) {
          std::copy_n(w, rows, staged);
        } else {
          stage(w, rows, depth, step * weight.k, staged);
        }
        for (int64_t p = 0; p < panels_; ++p) {
          const int64_t first = panel_begin(p) * kernels_.lanes, vectors = panel_begin(p + 1) - panel_begin(p);
          const Real* q = packed_ + first * k_ + k0 * vectors * kernels_.lanes;
          kernels_.outer(static_cast<int>(rows), static_cast<int>(vectors), staged, q, depth,
                         transposed_ + j * ld + first, ld, k0 > 0, step * weight.k);
        }
      }
    }
    kernels_.transpose(transposed_, ld, count, m_, c, ldc);
  }

  void multiply_columns_in_lanes(const Weight<Storage>& weight, int64_t begin, int64_t count, Real* c, int64_t ldc) {
    const int64_t widest = kernels_.panel();
    const Storage* w[kColumnsBlock];
    const Real* a[kMaxTileRows];
    for (int64_t j = 0; j < count; j += widest) {
      const int64_t used = std::min(widest, count - j), vectors = ceil_div(used, kernels_.lanes);
      const int64_t tiles = ceil_div(m_, kernels_.tile_rows(vectors));
      for (int64_t k0 = 0; k0 < k_; k0 += kColumnsBlock) {
        const int64_t depth = std::min(kColumnsBlock, k_ - k0);
        for (int64_t x = 0; x < depth; ++x) w[x] = weight.data + (k0 + x) * weight.n + begin + j;
        kernels_.pack(w, depth, used, vectors * kernels_.lanes, staged_, widest);
        for (int64_t t = 0; t < tiles; ++t) {
          const int64_t first = m_ * t / tiles, rows = m_ * (t + 1) / tiles - first;
          for (int64_t x = 0; x < rows; ++x) a[x] = real_rows_[first + x] + k0;
          kernels_.outer(static_cast<int>(rows), static_cast<int>(vectors), a, staged_, depth, c + first * ldc + j, ldc,
                         k0 > 0, 0);
        }
      }
    }
  }

  const Kernels<Storage>& kernels_;
  Real* packed_;      // kTokensInLanes: panels [k][width], one after the other; kDot: pack_dot_rows; kColumnsInLanes:
                      // widened rows [m][k]
  Real* staged_;      // a few widened weight rows, or a packed weight panel
  Real* transposed_;  // c^T of kTokensInLanes
  const Real** real_rows_;
  int64_t m_ = 0, k_ = 0, panels_ = 0, vectors_ = 0;
  GemmKernel kernel_ = GemmKernel::kDot;
};

}  // namespace moe
