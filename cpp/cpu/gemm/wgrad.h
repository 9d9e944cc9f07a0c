// The gradient of every expert's weight: output[e] = sum over the rows r of e of lhs[r] rhs[r]^T, [M, N].
//
// A unit is a run of M for one expert: its part of lhs is packed transposed, so that an element per row can be
// broadcast; panels of rhs are packed and passed under it. Every output element has one writer, which sums the rows in
// order.
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
};

template <typename Storage>
class WgradWorker {
  using Real = Wide<Storage>;

 public:
  struct Unit {
    int64_t expert, begin, count;  // output[expert, begin .. begin + count)
  };

  // Longest experts first. Their units are shorter, so that the packed lhs stays bounded.
  static std::vector<Unit> units(const Wgrad<Storage>& args) {
    std::vector<Unit> units;
    for (int64_t e = 0; e < args.num_experts; ++e) {
      const int64_t step = std::clamp<int64_t>(kPackedElements / std::max<int64_t>(rows_of(args, e), 1) / kStep * kStep,
                                               kStep, kMostCount);
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
           Arena::size_of_block<Real>(kRowsBlock * kernels.panel()) +
           Arena::size_of_block<Real>(kMostCount * kernels.panel()) + Arena::size_of_block<const Storage*>(rows);
  }

  WgradWorker(const Kernels<Storage>& kernels, const Wgrad<Storage>& args, const std::vector<Unit>& units, Arena& arena)
      : kernels_(kernels), args_(args), units_(units) {
    const int64_t rows = most_rows(args);
    packed_ = arena.take<Real>(packed_size(kernels, rows));
    panel_ = arena.take<Real>(kRowsBlock * kernels.panel());
    tile_ = arena.take<Real>(kMostCount * kernels.panel());
    pointers_ = arena.take<const Storage*>(rows);
  }

  void run(int64_t index) {
    const Unit& unit = units_[index];
    Storage* output = args_.output + (unit.expert * args_.m + unit.begin) * args_.n;
    const int64_t first = args_.expert_offsets[unit.expert], rows = rows_of(args_, unit.expert);
    if (rows == 0) {
      std::fill_n(output, unit.count * args_.n, Storage{});
      return;
    }
    // 1. lhs^T of the unit, [count, rows]: the rows of p.
    const int64_t ld = ceil_div(rows, kernels_.lanes) * kernels_.lanes;
    for (int64_t r = 0; r < rows; ++r) pointers_[r] = args_.lhs[first + r] + unit.begin;
    kernels_.pack_transposed(pointers_, rows, unit.count, ld, packed_);
    // 2. One panel of rhs at a time.
    const int64_t widest = kernels_.panel();
    for (int64_t j = 0; j < args_.n; j += widest) {
      const int64_t used = std::min(widest, args_.n - j), vectors = ceil_div(used, kernels_.lanes);
      const int64_t width = vectors * kernels_.lanes;
      for (int64_t r0 = 0; r0 < rows; r0 += kRowsBlock) {
        const int64_t depth = std::min(kRowsBlock, rows - r0);
        for (int64_t r = 0; r < depth; ++r) pointers_[r] = args_.rhs[first + r0 + r] + j;
        kernels_.pack(pointers_, depth, used, width, panel_);
        add_products(unit.count, packed_ + r0, ld, depth, static_cast<int>(vectors), r0 > 0);
      }
      for (int64_t i = 0; i < unit.count; ++i) {
        kernels_.narrow_row(tile_ + i * width, used, output + i * args_.n + j);
      }
    }
  }

 private:
  static constexpr int64_t kStep = 24, kMostCount = 8 * kStep;  // count of a unit: a multiple of every tile's rows
  static constexpr int64_t kPackedElements = int64_t{1} << 18;  // of the packed lhs
  static constexpr int64_t kRowsBlock = 256;

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

  // tile[i, :] (+)= sum over depth of p[i][r] * panel[r, :]
  void add_products(int64_t count, const Real* p, int64_t ld, int64_t depth, int vectors, bool accumulate) {
    const int64_t width = vectors * kernels_.lanes;
    const int64_t step = kernels_.tile_rows(vectors);
    const Real* row[kMaxTileRows];
    for (int64_t i = 0; i < count; i += step) {
      const int64_t tile_rows = std::min<int64_t>(step, count - i);
      for (int64_t x = 0; x < tile_rows; ++x) row[x] = p + (i + x) * ld;
      kernels_.outer(static_cast<int>(tile_rows), vectors, row, panel_, width, depth, tile_ + i * width, width,
                     accumulate);
    }
  }

  const Kernels<Storage>& kernels_;
  const Wgrad<Storage>& args_;
  const std::vector<Unit>& units_;
  Real* packed_;  // lhs^T of the unit
  Real* panel_;   // [kRowsBlock, width] of rhs
  Real* tile_;    // [count, width] of the output
  const Storage** pointers_;
};

template <typename Storage>
bool run_wgrad(const Wgrad<Storage>& args, const ThreadPool& pool) {
  const Kernels<Storage>& table = kernels<Storage>();
  const auto units = WgradWorker<Storage>::units(args);
  advise_huge_pages(args.output, static_cast<size_t>(args.num_experts * args.m * args.n) * sizeof(Storage));
  return run_units(pool, static_cast<int64_t>(units.size()), WgradWorker<Storage>::scratch_bytes(table, args),
                   [&](Arena& arena) { return WgradWorker<Storage>(table, args, units, arena); });
}

}  // namespace moe
