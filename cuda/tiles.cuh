// Which tile a block works on, and where the rows of a tile come from.
#pragma once

#include "grouped_gemm.cuh"
#include "launch.cuh"

namespace moe::cuda {

struct Tile {
  int32_t expert;
  int64_t first_row, rows;  // of R; 1 <= rows <= tile_rows
  int64_t column_tile;
};

__device__ __forceinline__ int64_t count_tiles(const TileSchedule& schedule, int64_t num_experts) {
  return schedule.first_tile[num_experts];
}

// The tile of number `work`: column tiles of one block of rows are neighbours, so that its rows stay in the cache.
__device__ __forceinline__ Tile find_tile(const TileSchedule& schedule, int64_t num_experts, int64_t column_tiles,
                                          int64_t work) {
  const int64_t row_tile = work / column_tiles;
  int64_t low = 0, high = num_experts;  // the last place in `order` whose first tile is <= row_tile
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (schedule.first_tile[middle] <= row_tile ? low : high) = middle;
  }
  const int32_t expert = schedule.order[low];
  const int64_t end = schedule.offsets[expert + 1];
  const int64_t first_row = schedule.offsets[expert] + (row_tile - schedule.first_tile[low]) * schedule.tile_rows;
  const int64_t left = end - first_row;
  return {expert, first_row, left < schedule.tile_rows ? left : schedule.tile_rows, work % column_tiles};
}

// A Gather as a kernel reads it. slot / top_k is a multiplication: slots have 31 bits, so 2^(31 + s) / top_k rounded
// up, 2^s >= top_k, is exact enough.
struct RowMap {
  const int32_t* row_to_slot;
  int64_t num_slots;
  uint32_t factor;
  int shift;

  RowMap() = default;
  explicit RowMap(const Gather& gather) : row_to_slot(gather.row_to_slot), num_slots(gather.num_slots) {
    int log2 = 0;
    while (int64_t{1} << log2 < gather.top_k) ++log2;
    shift = 31 + log2;
    factor = static_cast<uint32_t>(((uint64_t{1} << shift) + static_cast<uint64_t>(gather.top_k) - 1) /
                                   static_cast<uint64_t>(gather.top_k));
  }

  // The slot of a row, or -1.
  __device__ __forceinline__ int64_t slot(int64_t row) const {
    const int64_t slot = row_to_slot[row];
    return slot >= 0 && slot < num_slots ? slot : -1;
  }
  // The row of the source matrix that row `row` is, or -1: zeros.
  __device__ __forceinline__ int64_t source(int64_t row) const {
    if (row_to_slot == nullptr) return row;
    const int64_t from = slot(row);
    return from < 0 ? -1 : static_cast<int64_t>((static_cast<uint64_t>(from) * factor) >> shift);
  }
};

// Blocks of a persistent kernel: as many as run at once, but no more than there can be tiles.
inline Status persistent_blocks(int64_t most_tiles, int per_multiprocessor, const CudaContext& cuda, unsigned& blocks) {
  int multiprocessors = 0;
  const Status status = device_attribute(multiprocessors, cudaDevAttrMultiProcessorCount, cuda);
  const int64_t resident = int64_t{multiprocessors} * per_multiprocessor;
  blocks = static_cast<unsigned>(most_tiles < resident ? most_tiles : resident);
  return status;
}

// The largest number of row tiles that a schedule can have.
inline int64_t most_row_tiles(const TileSchedule& schedule, int64_t num_rows, int64_t num_experts) {
  return num_rows / schedule.tile_rows + (num_rows < num_experts ? num_rows : num_experts);
}

}  // namespace moe::cuda
