// Cuts a grouped GEMM into units: some rows of one expert times some columns. The units of one block of rows stay
// together, so that a thread can keep the rows that it has packed.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "parallel.h"

namespace moe {

struct RowBlock {
  int64_t expert, first, rows;  // rows [first, first + rows)
};

// By expert.
inline std::vector<RowBlock> row_blocks(const int64_t* expert_offsets, int64_t num_experts, int64_t max_rows) {
  std::vector<RowBlock> blocks;
  for (int64_t e = 0; e < num_experts; ++e) {
    const int64_t begin = expert_offsets[e], rows = expert_offsets[e + 1] - begin, pieces = ceil_div(rows, max_rows);
    for (int64_t p = 0; p < pieces; ++p) {
      const int64_t first = rows * p / pieces, last = rows * (p + 1) / pieces;
      blocks.push_back({e, begin + first, last - first});
    }
  }
  return blocks;
}

inline std::vector<RowBlock> costliest_first(std::vector<RowBlock> blocks) {
  std::stable_sort(blocks.begin(), blocks.end(), [](const RowBlock& a, const RowBlock& b) { return a.rows > b.rows; });
  return blocks;
}

struct Unit {
  RowBlock rows;
  int64_t block;         // which run of columns
  int64_t begin, count;  // columns [begin, begin + count)
};

// Costliest first.
inline std::vector<Unit> units_of(std::vector<RowBlock> blocks, int64_t columns, int64_t columns_per_unit) {
  blocks = costliest_first(std::move(blocks));
  std::vector<Unit> units;
  units.reserve(blocks.size() * static_cast<size_t>(ceil_div(columns, columns_per_unit)));
  for (const RowBlock& rows : blocks) {
    for (int64_t begin = 0; begin < columns; begin += columns_per_unit) {
      units.push_back({rows, begin / columns_per_unit, begin, std::min(columns_per_unit, columns - begin)});
    }
  }
  return units;
}

}  // namespace moe
