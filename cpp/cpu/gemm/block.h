// One block of a grouped GEMM: some rows of one expert against some columns of its weight, in Real.
//
//   c[i, j] = sum over x < k of rows[i][x] * weight(j, x)
//
// Five ways, chosen by the sizes, the type and the layout of the weight alone, so that a result never depends on how
// the work was cut or on who did it (each c[i, j] is summed in the same order in every tile):
//   kDot             out_in, few rows: dot products along k, straight on the weight (dot.h, dot_stream.h)
//   kFours           out_in, rows that would fill few lanes of the next: the same, four rows to a vector (dot_fours.h)
//   kTokensInLanes   out_in, many rows: rows are packed, transposed, once; weight elements are broadcast, unpacked
//   kColumnsInLanes  in_out: a panel of the weight is packed; row elements are broadcast
//                    (these three: in pairs of bf16 where the processor multiplies those and k is even)
//   kTiles           bf16 on matrix units, either layout, k a multiple of 32: what is not the left factor is packed
#pragma once

#include <algorithm>
#include <type_traits>

#include "arena.h"
#include "gemm/ahead.h"
#include "gemm/kernels.h"
#include "moe/grouped_gemm.h"
#include "parallel.h"

namespace moe {

enum class GemmKernel : int8_t { kDot, kFours, kTokensInLanes, kColumnsInLanes, kTiles };

// The most rows that dot products serve better than rows four to a vector, where the weight is multiplied as it lies.
inline constexpr int64_t kMaxDotRowsOfNumbers = 6;
// The most that they serve better than packed panels where a weight has to be widened first.
inline constexpr int64_t kMaxWidenedDotProductRows = 24;

template <typename Storage>
GemmKernel choose_gemm(const Kernels<Storage>& kernels, WeightLayout layout, int64_t rows, bool pairs,
                       bool matrix_units) {
  if (matrix_units && (layout == WeightLayout::kInOut || rows > kFewDotRows)) return GemmKernel::kTiles;
  if (layout == WeightLayout::kInOut) return GemmKernel::kColumnsInLanes;
  const bool widened = !std::is_same_v<Storage, Wide<Storage>> && !pairs;
  // A product of pairs does two in one, so that the sums across lanes weigh less.
  const int64_t most_dot_rows = pairs ? kMaxDotRows : kMaxDotRowsOfNumbers;
  if (!widened && rows > most_dot_rows && rows <= kernels.most_fours_rows) return GemmKernel::kFours;
  return rows <= (widened ? kMaxWidenedDotProductRows : kMaxDotRows) ? GemmKernel::kDot : GemmKernel::kTokensInLanes;
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

  const Storage* column(int64_t j) const { return data + (layout == WeightLayout::kOutIn ? j * k : j); }
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

  // Rows per block: as many as the packed rows of kPackedBytes.
  static int64_t max_rows(const Kernels<Storage>& kernels, int64_t k) {
    const int64_t panel = kernels.panel();
    const int64_t fit = kPackedBytes / (std::max<int64_t>(k, 1) * static_cast<int64_t>(sizeof(Real)));
    return std::clamp(fit / panel * panel, panel, 4 * panel);
  }

  // Scratch for blocks of up to `rows` rows, contracted width k, and c of up to `columns` columns.
  static size_t scratch_bytes(const Kernels<Storage>& kernels, int64_t rows, int64_t k, int64_t columns) {
    const int64_t panel = kernels.panel(), padded_rows = ceil_div(rows, panel) * panel;
    return Arena::size_of_block<Real>(packed_size(kernels, padded_rows, k)) +
           Arena::size_of_block<Real>(staged_size(kernels, columns)) +
           Arena::size_of_block<Real>(padded_rows * columns) + Arena::size_of_block<const Real*>(rows);
  }

  BlockGemm(const Kernels<Storage>& kernels, Arena& arena, int64_t rows, int64_t k, int64_t columns)
      : kernels_(kernels) {
    const int64_t panel = kernels.panel(), padded_rows = ceil_div(rows, panel) * panel;
    packed_ = arena.take<Real>(packed_size(kernels, padded_rows, k));
    staged_ = arena.take<Real>(staged_size(kernels, columns));
    transposed_ = arena.take<Real>(padded_rows * columns);
    real_rows_ = arena.take<const Real*>(rows);
  }

  // Makes m rows of width k ready for any number of calls of multiply. The pointers are not kept; the rows are.
  // row_invariant: as if there were many, so that a row's result does not depend on how many others there are.
  void load_rows(const Storage* const* rows, int64_t m, int64_t k, WeightLayout layout, bool row_invariant = false) {
    m_ = m;
    k_ = k;
    pairs_ = kernels_.outer_pairs != nullptr && k % 2 == 0;
    kernel_ = choose_gemm(kernels_, layout, row_invariant ? kMaxWidenedDotProductRows + 1 : m, pairs_,
                          kernels_.matrix_units != nullptr && k % MatrixUnits::kDepth == 0);
    if (kernel_ == GemmKernel::kTiles) return load_tile_rows(rows, layout);
    if (kernel_ == GemmKernel::kTokensInLanes) {
      width_ = ceil_div(m, kernels_.narrow_lanes) * kernels_.narrow_lanes;
      panels_ = ceil_div(width_, kernels_.panel());
      for (int64_t p = 0; p < panels_; ++p) {
        const int64_t first = panel_begin(p), width = panel_begin(p + 1) - first;
        if (pairs_) {
          for (int64_t i = first; i < m; ++i) real_rows_[i] = reinterpret_cast<const Real*>(rows[i]);
          kernels_.pack_reals_transposed(real_rows_ + first, m - first, k / 2, width, packed_ + first * (k / 2));
        } else {
          kernels_.pack_transposed(rows + first, m - first, k, width, packed_ + first * k);
        }
      }
      return;
    }
    if (kernel_ == GemmKernel::kDot) return pack_dot_rows(rows);
    for (int64_t i = 0; i < m; ++i) {
      if (direct()) {
        real_rows_[i] = reinterpret_cast<const Real*>(rows[i]);
      } else {
        kernels_.widen_row(rows[i], k, packed_ + i * k);
        real_rows_[i] = packed_ + i * k;
      }
    }
    if (kernel_ == GemmKernel::kFours) kernels_.pack_fours(real_rows_, m, packed_depth(), packed_);
  }

  // c[i * ldc + columns.offset(run) + j]; ldc >= columns.width(). Columns of padding hold anything.
  // `next` is the column of the weight, or of another, with which the next call will begin, if that is known.
  void multiply(const Weight<Storage>& weight, const Columns& columns, Real* c, int64_t ldc,
                const Storage* next = nullptr) {
    for (int run = 0; run < columns.runs; ++run) {
      Real* out = c + columns.offset(run);
      if (k_ == 0) {  // an empty sum, which no block of k would write
        for (int64_t i = 0; i < m_; ++i) std::fill_n(out + i * ldc, columns.count, Real(0));
        continue;
      }
      const Storage* after = run + 1 < columns.runs ? weight.column(columns.begin[run + 1]) : next;
      switch (kernel_) {
        case GemmKernel::kDot:
          multiply_dot(weight, columns.begin[run], columns.count, out, ldc, after);
          break;
        case GemmKernel::kFours:
          multiply_fours(weight, columns.begin[run], columns.count, out, ldc, after);
          break;
        case GemmKernel::kTokensInLanes:
          multiply_tokens_in_lanes(weight, columns.begin[run], columns.count, out, ldc);
          break;
        case GemmKernel::kColumnsInLanes:
          multiply_columns_in_lanes(weight, columns.begin[run], columns.count, out, ldc, after);
          break;
        case GemmKernel::kTiles:
          multiply_tiles(weight, columns.begin[run], columns.count, out, ldc);
          break;
      }
    }
  }

 private:
  static constexpr int64_t kPackedBytes = 4 << 20;
  static constexpr int64_t kCachedBytes = 512 << 10;  // of packed rows at a time: they stay in the second-level cache
  // Contracted elements at a time. Of dot products: so many that a block of all rows stays in the first-level cache,
  // beside a few rows of the weight. Of rows of the weight that are widened first: the same, for one tile's rows. Of
  // in_out: so many that two blocks stay in the second-level cache.
  static constexpr int64_t kDepth = 512, kColumnsDepth = 128;
  static constexpr int64_t kTilesDepth = 2 * kColumnsDepth;  // of half the width
  static constexpr int64_t kPieceBytes = 64 << 10;           // of a weight that several tiles read, one after the other

  static int64_t packed_size(const Kernels<Storage>& kernels, int64_t padded_rows, int64_t k) {
    const int64_t dot_rows = std::min(padded_rows, kMaxWidenedDotProductRows);
    return std::max(padded_rows * (k + MatrixUnits::kDepth), dot_rows * (k + ceil_div(k, kDepth) * kernels.dot_step));
  }
  static int64_t staged_size(const Kernels<Storage>& kernels, int64_t columns) {
    const int64_t panel = kernels.panel();
    return std::max<int64_t>(kMaxTileRows * (kDepth + kernels.lanes), kColumnsDepth * ceil_div(columns, panel) * panel);
  }

  // One row: all of k, since nothing else needs the cache. More: equal parts of k, of which the rows of a tile stay in
  // half of a first-level cache.
  int64_t dot_depth() const {
    if (m_ == 1) return k_;
    const int64_t most = (m_ <= kFewDotRows ? 2 : 1) * kDepth * kernels_.dot_step / kernels_.dot_width,
                  step = kernels_.dot_step;
    return std::min(k_, ceil_div(ceil_div(k_, ceil_div(k_, most)), step) * step);
  }
  int64_t dot_tiles() const { return ceil_div(m_, kMaxDotRows); }
  int64_t dot_row_size(int64_t depth) const { return ceil_div(depth, kernels_.dot_step) * kernels_.dot_width; }

  // packed_: in each part of k, tile after tile.
  void pack_dot_rows(const Storage* const* rows) {
    Real* out = packed_;
    for (int64_t k0 = 0, depth; k0 < k_; k0 += depth) {
      depth = std::min(dot_depth(), k_ - k0);
      for (int64_t t = 0; t < dot_tiles(); ++t) {
        const int64_t first = m_ * t / dot_tiles(), count = m_ * (t + 1) / dot_tiles() - first;
        for (int64_t i = 0; i < count; ++i) {
          kernels_.arrange_for_dot(rows[first + i] + k0, depth, out + i * kernels_.dot_width,
                                   count * kernels_.dot_width);
        }
        out += count * dot_row_size(depth);
      }
    }
  }

  // In each part of k, as few tiles of rows as can be, evenly filled. All but the first read a piece of the weight that
  // the first has left in the second-level cache.
  void multiply_dot(const Weight<Storage>& weight, int64_t begin, int64_t count, Real* c, int64_t ldc,
                    const Storage* next) {
    const int64_t tiles = dot_tiles();
    const Storage* first = weight.data + begin * k_;
    const Real* packed = packed_;
    for (int64_t k0 = 0, depth; k0 < k_; k0 += depth) {
      depth = std::min(dot_depth(), k_ - k0);
      const int64_t bytes = depth * static_cast<int64_t>(sizeof(Storage));
      const int64_t piece = tiles == 1 ? count : std::max<int64_t>(kPieceBytes / bytes, 1);
      for (int64_t j = 0; j < count; j += piece) {
        const Storage* w = first + j * k_ + k0;
        const Storage* after = j + piece < count ? w + piece * k_ : k0 + depth < k_ ? first + k0 + depth : next;
        for (int64_t t = 0; t < tiles; ++t) {
          const int64_t row = m_ * t / tiles, rows = m_ * (t + 1) / tiles - row;
          kernels_.dot(static_cast<int>(rows), std::min(piece, count - j), packed + row * dot_row_size(depth), w, k_,
                       depth, after, c + row * ldc + j, ldc, k0 > 0 ? TileStore::kAdd : TileStore::kWrite);
        }
      }
      packed += m_ * dot_row_size(depth);
    }
  }

  // A few rows of the weight at a time against all rows, while the next few are fetched.
  void multiply_fours(const Weight<Storage>& weight, int64_t begin, int64_t count, Real* c, int64_t ldc,
                      const Storage* next) {
    const int64_t k = packed_depth(), depth = kernels_.lanes / kRowsOfVector, steps = ceil_div(k, depth);
    const int64_t vectors = ceil_div(m_, kRowsOfVector), columns = kernels_.tile_rows(vectors), size = sizeof(Real);
    const int64_t blocks = ceil_div(steps * vectors * kernels_.lanes * size, kCachedBytes);
    const auto multiply = pairs_ ? kernels_.dot_fours_pairs : kernels_.dot_fours;
    const Real* rows = reinterpret_cast<const Real*>(weight.data + begin * k_);
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t first = steps * b / blocks, block_steps = steps * (b + 1) / blocks - first;
      const int64_t k0 = first * depth, block_k = std::min(block_steps * depth, k - k0);
      for (int64_t j = 0; j < count; j += columns) {
        const int64_t rest = count - j - columns;
        const void* later = rest > 0 ? rows + (j + columns) * k + k0 : reinterpret_cast<const Real*>(next);
        RowsAhead ahead(later, rest > 0 ? std::min(columns, rest) : columns, k * size, block_k * size, block_steps);
        multiply(static_cast<int>(m_), static_cast<int>(std::min(columns, count - j)),
                 packed_ + first * vectors * kernels_.lanes, rows + j * k + k0, k, block_k, c + j, ldc,
                 b > 0 ? TileStore::kAdd : TileStore::kWrite, ahead.next(block_steps));
      }
    }
  }

  // The rows fill width_ lanes, shared among the panels as evenly as whole vectors allow, of which the last may be a
  // narrow one: 145 rows are 48 + 48 + 56 lanes, where three equal panels would compute 192 rows.
  int64_t panel_begin(int64_t panel) const {
    return panel == panels_ ? width_ : ceil_div(width_, kernels_.lanes) * panel / panels_ * kernels_.lanes;
  }

  // Widens a few rows of the weight, once for all the tiles that read them.
  template <typename WidenRow>
  void stage(int64_t rows, const WidenRow& widen, const Real** staged) {
    for (int64_t x = 0; x < rows; ++x) {
      Real* out = staged_ + x * (kDepth + kernels_.lanes);
      widen(x, out);
      staged[x] = out;
    }
  }

  // Whether the numbers of rows and weight are multiplied as they lie.
  bool direct() const { return std::is_same_v<Storage, Real> || pairs_; }
  int64_t packing() const { return pairs_ ? 2 : 1; }
  int64_t packed_depth() const { return k_ / packing(); }  // k in numbers or pairs
  auto outer() const { return pairs_ ? kernels_.outer_pairs : kernels_.outer; }

  // A few rows of the weight at a time, each read along k for as long as the packed rows stay cached. The next few are
  // fetched meanwhile, unless they are so long that the processor's own prefetcher has time to find them.
  void multiply_tokens_in_lanes(const Weight<Storage>& weight, int64_t begin, int64_t count, Real* c, int64_t ldc) {
    constexpr int64_t kLongRow = 8 << 10;
    const int64_t ld = width_, k = packed_depth(), stride = weight.k * static_cast<int64_t>(sizeof(Storage));
    const int64_t blocks = ceil_div(k * ld * static_cast<int64_t>(sizeof(Real)), kCachedBytes);
    const int64_t step = kernels_.tile_rows(ceil_div(ceil_div(width_, kernels_.lanes), panels_));
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t first = k * b / blocks, last = k * (b + 1) / blocks;
      const int64_t depth = direct() ? last - first : kDepth;
      for (int64_t j = 0; j < count; j += step) {
        const Storage* row = weight.data + (begin + j) * weight.k;
        const int64_t later = stride > kLongRow ? 0 : std::clamp<int64_t>(count - j - step, 0, step);
        RowsAhead ahead(row + step * weight.k + first * packing(), later, stride,
                        (last - first) * packing() * static_cast<int64_t>(sizeof(Storage)), (last - first) * panels_);
        for (int64_t k0 = first; k0 < last; k0 += depth) {
          multiply_panels(row, weight.k, std::min(step, count - j), k0, std::min(depth, last - k0), ahead,
                          transposed_ + j * ld);
        }
      }
    }
    kernels_.transpose(transposed_, ld, count, m_, c, ldc);
  }

  // c^T of a few rows of the weight, over `depth` from k0.
  void multiply_panels(const Storage* weight, int64_t stride, int64_t rows, int64_t k0, int64_t depth, RowsAhead& ahead,
                       Real* out) {
    const Real* p[kMaxTileRows];
    if constexpr (std::is_same_v<Storage, Real>) {
      for (int64_t x = 0; x < rows; ++x) p[x] = weight + x * stride + k0;
    } else if (pairs_) {
      for (int64_t x = 0; x < rows; ++x) p[x] = reinterpret_cast<const Real*>(weight + x * stride + 2 * k0);
    } else {
      stage(rows, [&](int64_t x, Real* row) { kernels_.widen_row(weight + x * stride + k0, depth, row); }, p);
    }
    for (int64_t panel = 0; panel < panels_; ++panel) {
      const int64_t first = panel_begin(panel), width = panel_begin(panel + 1) - first;
      outer()(static_cast<int>(rows), static_cast<int>(width), p, packed_ + first * packed_depth() + k0 * width, width,
              depth, out + first, width_, k0 > 0 ? TileStore::kAdd : TileStore::kWrite, ahead.next(depth));
    }
  }

  // A strip of the weight at a time, while the next one is fetched. Few rows of numbers read it where it lies; else, or
  // if it ends within a vector, it is packed into panels that stay in the first-level cache.
  void multiply_columns_in_lanes(const Weight<Storage>& weight, int64_t begin, int64_t count, Real* c, int64_t ldc,
                                 const Storage* next) {
    const bool in_place =
        std::is_same_v<Storage, Real> && m_ <= kernels_.most_in_place_rows && count % kernels_.lanes == 0;
    const int64_t widest = (in_place ? vectors_in_place() : kernels_.tile_vectors) * kernels_.lanes;
    const int64_t panels = ceil_div(count, widest), most_depth = kColumnsDepth * packing();
    const Real* a[kMaxTileRows];
    for (int64_t x0 = 0, later; x0 < k_; x0 = later) {
      later = std::min(x0 + most_depth, k_);
      const int64_t k0 = x0 / packing(), depth = (later - x0) / packing();
      const int64_t tiles = ceil_div(m_, kernels_.tile_rows(widest / kernels_.lanes));
      RowsAhead ahead(later < k_ ? weight.column(begin) + later * weight.n : next,
                      std::min(most_depth, later < k_ ? k_ - later : k_),
                      weight.n * static_cast<int64_t>(sizeof(Storage)), count * static_cast<int64_t>(sizeof(Storage)),
                      panels * tiles * depth, true);
      if (!in_place) pack_strip(weight, begin, count, x0, later - x0);
      for (int64_t j = 0; j < count; j += widest) {
        const int64_t vectors = ceil_div(std::min(widest, count - j), kernels_.lanes);
        const int64_t tiles = ceil_div(m_, kernels_.tile_rows(vectors)), ldq = in_place ? weight.n : widest;
        const Storage* in_weight = weight.data + k0 * weight.n + begin + j;
        const Real* q = in_place ? reinterpret_cast<const Real*>(in_weight) : staged_ + j * depth;
        for (int64_t t = 0; t < tiles; ++t) {
          const int64_t first = m_ * t / tiles, rows = m_ * (t + 1) / tiles - first;
          for (int64_t x = 0; x < rows; ++x) a[x] = real_rows_[first + x] + k0;
          outer()(static_cast<int>(rows), static_cast<int>(vectors * kernels_.lanes), a, q, ldq, depth,
                  c + first * ldc + j, ldc, k0 > 0 ? TileStore::kAdd : TileStore::kWrite, ahead.next(depth));
        }
      }
    }
  }

  // As wide as a tile can be without more tiles one above the other.
  int64_t vectors_in_place() const {
    const int64_t most_rows = kernels_.tile_rows(ceil_div(kernels_.accumulators, kMaxTileRows));
    return std::min<int64_t>(kernels_.tile_vectors, kernels_.accumulators / ceil_div(m_, ceil_div(m_, most_rows)));
  }

  // Rows [k0, k0 + depth) of an in_out weight.
  void pack_strip(const Weight<Storage>& weight, int64_t begin, int64_t count, int64_t k0, int64_t depth) {
    const Storage* w[2 * kColumnsDepth];
    for (int64_t x = 0; x < depth; ++x) w[x] = weight.data + (k0 + x) * weight.n + begin;
    const auto pack = pairs_ ? kernels_.pack_pairs : kernels_.pack;
    pack(w, depth, count, kernels_.panel(), staged_);
  }

  // out_in: the rows are packed as the right factor of c^T = W rows^T. in_out: they are copied as the left one.
  void load_tile_rows(const Storage* const* rows, WeightLayout layout) {
    if constexpr (std::is_same_v<Storage, BFloat16>) {
      BFloat16* packed = reinterpret_cast<BFloat16*>(packed_);
      if (layout == WeightLayout::kOutIn) return kernels_.matrix_units->pack_columns(rows, m_, k_, packed);
      for (int64_t i = 0; i < m_; ++i) std::copy_n(rows[i], k_, packed + i * tile_row_size());
    }
  }
  // NOTE: one cache line more than it need be, or at a power of two all rows would fall into the same
  // cache sets.
  int64_t tile_row_size() const { return k_ + MatrixUnits::kDepth; }

  void multiply_tiles(const Weight<Storage>& weight, int64_t begin, int64_t count, Real* c, int64_t ldc) {
    if constexpr (std::is_same_v<Storage, BFloat16>) {
      constexpr int64_t kRows = MatrixUnits::kRows, kGroup = MatrixUnits::kColumns;
      const MatrixUnits& units = *kernels_.matrix_units;
      const BFloat16* packed = reinterpret_cast<const BFloat16*>(packed_);
      if (weight.layout == WeightLayout::kOutIn) {
        const int64_t groups = ceil_div(m_, kGroup), ld = groups * kGroup;
        for (int64_t j = 0; j < count; j += kRows) {
          units.multiply(weight.data + (begin + j) * k_, k_, std::min(kRows, count - j), packed, groups, k_,
                         transposed_ + j * ld, ld, false);
        }
        return kernels_.transpose(transposed_, ld, count, m_, c, ldc);
      }
      // A strip of the weight at a time is the right factor.
      BFloat16* strip = reinterpret_cast<BFloat16*>(staged_);
      const Storage* w[kTilesDepth];
      for (int64_t k0 = 0; k0 < k_; k0 += kTilesDepth) {
        const int64_t depth = std::min(kTilesDepth, k_ - k0);
        for (int64_t x = 0; x < depth; ++x) w[x] = weight.data + (k0 + x) * weight.n + begin;
        units.pack_rows(w, depth, count, depth * kGroup, strip);
        for (int64_t i = 0; i < m_; i += kRows) {
          units.multiply(packed + i * tile_row_size() + k0, tile_row_size(), std::min(kRows, m_ - i), strip,
                         ceil_div(count, kGroup), depth, c + i * ldc, ldc, k0 > 0);
        }
      }
    }
  }

  const Kernels<Storage>& kernels_;
  Real* packed_;      // kTokensInLanes: panels [k][width], one after the other; kDot: pack_dot_rows; kColumnsInLanes:
                      // widened rows [m][k]
  Real* staged_;      // a few widened weight rows, or a packed weight strip
  Real* transposed_;  // c^T of kTokensInLanes
  const Real** real_rows_;
  int64_t m_ = 0, k_ = 0, panels_ = 0, width_ = 0;
  bool pairs_ = false;  // whether rows and weight are multiplied in pairs of elements
  GemmKernel kernel_ = GemmKernel::kDot;
};

}  // namespace moe
