// The gradient of every expert's weight: output[e] = sum over the rows r of e of lhs[r] rhs[r]^T, [M, N].
//
// A unit is a run of M for one expert: its part of lhs is packed transposed, so that an element per row can be
// broadcast; panels of rhs are packed and passed under it. Every output element has one writer, which sums the rows in
// order. Tiles go straight to the output where they can, past the caches when it is larger than they are: an expert
// with few rows spends its time on writing.
#pragma once

#include <algorithm>
#include <vector>

#include "gemm/kernels.h"
#include "units.h"

namespace moe {

template <typename Storage>
struct Wgrad {
  using Real = Wide<Storage>;
  Storage* output;                // [E, M, N]
  const Storage* const* lhs;      // [R] rows of M
  const Storage* const* rhs;      // [R] rows of N
  const int64_t* expert_offsets;  // [E + 1], sanitised
  int64_t num_experts, m, n;
  bool accumulate;  // output[e] += ...
};

template <typename Storage>
class WgradWorker {
  using Real = Wide<Storage>;

 public:
  struct Unit {
    int64_t expert, begin, count;  // output[expert, begin .. begin + count)
  };

  // Longest experts first. Their units are shorter, so that the packed lhs stays bounded. rhs is packed anew for every
  // unit: they are as long as leaves some for each thread.
  static std::vector<Unit> units(const Wgrad<Storage>& args, int64_t threads) {
    const int64_t share = args.num_experts * args.m / (kUnitsPerThread * std::max<int64_t>(threads, 1));
    const int64_t most = std::clamp<int64_t>(share / kStep * kStep, kFewCount, kMostCount);
    std::vector<Unit> units;
    for (int64_t e = 0; e < args.num_experts; ++e) {
      const int64_t step =
          std::clamp<int64_t>(kPackedElements / std::max<int64_t>(rows_of(args, e), 1) / kStep * kStep, kStep, most);
      for (int64_t i = 0; i < args.m; i += step) units.push_back({e, i, std::min(step, args.m - i)});
    }
    std::stable_sort(units.begin(), units.end(), [&](const Unit& a, const Unit& b) {
      return rows_of(args, a.expert) * a.count > rows_of(args, b.expert) * b.count;
    });
    return units;
  }

  static size_t scratch_bytes(const Kernels<Storage>& kernels, const Wgrad<Storage>& args) {
    const int64_t rows = most_rows(args);
    return Arena::size_of_block<Real>(packed_size(kernels, rows)) +
           Arena::size_of_block<Real>(std::max<int64_t>(kStripElements, kRowsBlock * kernels.panel())) +
           Arena::size_of_block<Real>(tile_size(kernels)) + Arena::size_of_block<Real>(kernels.panel()) +
           Arena::size_of_block<const Storage*>(rows);
  }

  WgradWorker(const Kernels<Storage>& kernels, const Wgrad<Storage>& args, const std::vector<Unit>& units, Arena& arena)
      : kernels_(kernels), args_(args), units_(units) {
    const int64_t rows = most_rows(args);
    packed_ = arena.take<Real>(packed_size(kernels, rows));
    panels_ = arena.take<Real>(std::max<int64_t>(kStripElements, kRowsBlock * kernels.panel()));
    tile_ = arena.take<Real>(tile_size(kernels));
    row_ = arena.take<Real>(kernels.panel());
    streams_ = can_stream();
    pointers_ = arena.take<const Storage*>(rows);
  }

  void run(int64_t index) {
    const Unit& unit = units_[index];
    Storage* output = args_.output + (unit.expert * args_.m + unit.begin) * args_.n;
    const int64_t first = args_.expert_offsets[unit.expert], rows = rows_of(args_, unit.expert);
    if (rows == 0) {
      if (!args_.accumulate) std::fill_n(output, unit.count * args_.n, Storage{});
      return;
    }
    // 1. lhs^T of the unit, [count, rows]: the rows of p.
    for (int64_t r = 0; r < rows; ++r) pointers_[r] = args_.lhs[first + r] + unit.begin;
    const int64_t ld = pack_lhs(rows, unit.count);
    // 2. A strip of rhs at a time, packed into panels.
    const int64_t strip = strip_of(std::clamp(rows, MatrixUnits::kDepth, kRowsBlock));
    for (int64_t j = 0; j < args_.n; j += strip) {
      const int64_t columns = std::min(strip, args_.n - j);
      for (int64_t r0 = 0; r0 < rows; r0 += kRowsBlock) {
        const int64_t depth = std::min(kRowsBlock, rows - r0);
        for (int64_t r = 0; r < depth; ++r) pointers_[r] = args_.rhs[first + r0 + r] + j;
        const Strip out{output + j, unit.count, columns};
        const RowsPart part{r0 == 0, r0 + depth == rows};
        kernels_.matrix_units ? add_tiles(out, r0, ld, depth, part)
                              : add_products(out, packed_ + r0 / packing(), ld, depth, part);
      }
    }
    if (streams_) kernels_.finish_streams();
  }

 private:
  // count of a unit: a multiple of every tile's rows
  static constexpr int64_t kStep = 24, kFewCount = 8 * kStep, kMostCount = 24 * kStep, kUnitsPerThread = 8;
  static constexpr int64_t kPackedElements = int64_t{1} << 18;  // of the packed lhs
  static constexpr int64_t kRowsBlock = 256;                    // even: no pair of rows is torn apart
  static constexpr size_t kStreamedBytes = size_t{8} << 20;     // a smaller output is still cached when it is read next

  static constexpr int64_t kStripElements = 64 << 10;  // of packed rhs: they stay in the second-level cache

  struct Strip {
    Storage* output;
    int64_t rows, columns;
  };

  // Which part of the sums over an expert's rows a call computes.
  struct RowsPart {
    bool first, last;
  };

  // Rows that share the room of a Real: pairs of bf16 where the processor multiplies those.
  int64_t packing() const { return kernels_.outer_pairs != nullptr ? 2 : 1; }

  int64_t strip_of(int64_t depth) const {
    const int64_t panel = kernels_.panel();
    return std::max<int64_t>(kStripElements / (depth * panel), 1) * panel;
  }
  static int64_t tile_size(const Kernels<Storage>& kernels) {
    return (kMostCount + MatrixUnits::kRows) * std::max<int64_t>(kStripElements / kRowsBlock, kernels.panel());
  }

  bool can_stream() const {
    const size_t bytes = static_cast<size_t>(args_.num_experts * args_.m * args_.n) * sizeof(Storage);
    return !args_.accumulate && bytes > kStreamedBytes &&
           (reinterpret_cast<uintptr_t>(args_.output) | static_cast<size_t>(args_.n) * sizeof(Storage)) %
                   kStreamAlignment ==
               0;
  }

  static int64_t rows_of(const Wgrad<Storage>& args, int64_t expert) {
    return args.expert_offsets[expert + 1] - args.expert_offsets[expert];
  }

  static int64_t most_rows(const Wgrad<Storage>& args) {
    int64_t most = 0;
    for (int64_t e = 0; e < args.num_experts; ++e) most = std::max(most, rows_of(args, e));
    return most;
  }
  static int64_t packed_size(const Kernels<Storage>& kernels, int64_t rows) {
    return std::max(kPackedElements, kStep * rows) + kMostCount * kernels.lanes;  // each packed row is padded to lanes
  }

  // lhs^T of the rows at pointers_, [count, rows]; returns how far its rows are apart.
  int64_t pack_lhs(int64_t rows, int64_t count) {
    if constexpr (std::is_same_v<Storage, BFloat16>) {
      if (kernels_.matrix_units) {
        const int64_t ld = ceil_div(rows, MatrixUnits::kDepth) * MatrixUnits::kDepth;
        kernels_.matrix_units->pack_transposed(pointers_, rows, count, reinterpret_cast<BFloat16*>(packed_), ld);
        return ld;
      }
    }
    const int64_t ld = ceil_div(ceil_div(rows, packing()), kernels_.lanes) * kernels_.lanes;
    const auto pack = packing() == 2 ? kernels_.pack_pairs_transposed : kernels_.pack_transposed;
    pack(pointers_, rows, count, ld, packed_);
    return ld;
  }

  // Where the sums of output[i, j ..) are kept until they are finished: those of one block of rows are, at once.
  struct Sums {
    Real* data;
    int64_t ld;
  };
  Sums sums_at(const Strip& strip, int64_t i, int64_t j, RowsPart part) const {
    const int64_t widest = kernels_.panel(), ld = ceil_div(strip.columns, widest) * widest;
    return part.first && part.last ? Sums{tile_, widest} : Sums{tile_ + i * ld + j, ld};
  }

  // The strip (+)= sum over `depth` rows from r0, at pointers_, on matrix units. `part` as in add_products.
  void add_tiles(const Strip& strip, int64_t r0, int64_t ld, int64_t depth, RowsPart part) {
    if constexpr (std::is_same_v<Storage, BFloat16>) {
      constexpr int64_t kRows = MatrixUnits::kRows, kGroup = MatrixUnits::kColumns;
      const int64_t padded = ceil_div(depth, MatrixUnits::kDepth) * MatrixUnits::kDepth, widest = kernels_.panel();
      const BFloat16* lhs = reinterpret_cast<const BFloat16*>(packed_) + r0;
      BFloat16* rhs = reinterpret_cast<BFloat16*>(panels_);
      kernels_.matrix_units->pack_rows(pointers_, depth, strip.columns, padded * kGroup, rhs);
      for (int64_t i = 0; i < strip.rows; i += kRows) {
        const int64_t rows = std::min(kRows, strip.rows - i);
        for (int64_t j = 0; j < strip.columns; j += widest) {
          const int64_t used = std::min(widest, strip.columns - j);
          const Sums sums = sums_at(strip, i, j, part);
          kernels_.matrix_units->multiply(lhs + i * ld, ld, rows, rhs + j * padded, ceil_div(used, kGroup), padded,
                                          sums.data, sums.ld, !part.first);
          for (int64_t x = 0; part.last && x < rows; ++x) {
            finish_row(sums.data + x * sums.ld, used, strip.output + (i + x) * args_.n + j);
          }
        }
      }
    }
  }

  // The strip (+)= sum over `depth` rows, of p[i][r] * panels[r, :] or of pairs of those, a few output rows at a time,
  // from end to end. `part`: which rows of the expert these are; the tile holds the sums until the last ones have been
  // added.
  void add_products(const Strip& strip, const Real* p, int64_t ld, int64_t depth, RowsPart part) {
    const int64_t widest = kernels_.panel(), step = kernels_.tile_rows(kernels_.tile_vectors);
    const Real* row[kMaxTileRows];
    const int64_t products = ceil_div(depth, packing());
    const auto pack = packing() == 2 ? kernels_.pack_pairs : kernels_.pack;
    const auto outer = packing() == 2 ? kernels_.outer_pairs : kernels_.outer;
    pack(pointers_, depth, strip.columns, widest, panels_);
    for (int64_t i = 0; i < strip.rows; i += step) {
      const int64_t rows = std::min<int64_t>(step, strip.rows - i);
      for (int64_t x = 0; x < rows; ++x) row[x] = p + (i + x) * ld;
      const Real* panel = panels_;
      for (int64_t j = 0; j < strip.columns; j += widest, panel += products * widest) {
        const int64_t used = std::min(widest, strip.columns - j), vectors = ceil_div(used, kernels_.lanes);
        Storage* output = strip.output + i * args_.n + j;
        const auto multiply = [&](Real* c, int64_t ldc, TileStore how) {
          outer(static_cast<int>(rows), static_cast<int>(vectors * kernels_.lanes), row, panel, widest, products, c,
                ldc, how, {});
        };
        if constexpr (std::is_same_v<Storage, Real>) {
          if (used == vectors * kernels_.lanes) {
            multiply(output, args_.n,
                     args_.accumulate || !part.first ? TileStore::kAdd
                     : part.last && streams_         ? TileStore::kStream
                                                     : TileStore::kWrite);
            continue;
          }
        }
        const Sums sums = sums_at(strip, i, j, part);
        multiply(sums.data, sums.ld, part.first ? TileStore::kWrite : TileStore::kAdd);
        for (int64_t x = 0; part.last && x < rows; ++x) finish_row(sums.data + x * sums.ld, used, output + x * args_.n);
      }
    }
  }

  void finish_row(Real* sums, int64_t n, Storage* output) {
    if (args_.accumulate) {
      kernels_.widen_row(output, n, row_);
      kernels_.axpy(Real(1), row_, n, sums);
    }
    const bool whole_lines = static_cast<size_t>(n) * sizeof(Storage) % kStreamAlignment == 0;
    streams_&& whole_lines ? kernels_.stream_row(sums, n, output) : kernels_.narrow_row(sums, n, output);
  }

  const Kernels<Storage>& kernels_;
  const Wgrad<Storage>& args_;
  const std::vector<Unit>& units_;
  Real* packed_;  // lhs^T of the unit
  Real* panels_;  // of rhs
  Real* tile_;    // sums that are not finished, or not of the type of the output
  Real* row_;     // [width]
  bool streams_;
  const Storage** pointers_;
};

template <typename Storage>
bool run_wgrad(const Wgrad<Storage>& args, const ThreadPool& pool) {
  const Kernels<Storage>& table = kernels<Storage>();
  const auto units = WgradWorker<Storage>::units(args, pool.num_threads());
  advise_huge_pages(args.output, static_cast<size_t>(args.num_experts * args.m * args.n) * sizeof(Storage));
  return run_units(
      pool, static_cast<int64_t>(units.size()), WgradWorker<Storage>::scratch_bytes(table, args),
      [&](Arena& arena) { return WgradWorker<Storage>(table, args, units, arena); }, UnitOrder::kFromBothEnds);
}

}  // namespace moe
