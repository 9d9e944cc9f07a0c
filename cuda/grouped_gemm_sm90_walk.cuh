// Which tile is next: the persistent walk of a block over the tiles of all experts.
//
// Tiles come in groups of eight row tiles by all column tiles, so that what blocks work on at one time shares weights
// and rows in the L2 cache. Every warp walks by itself: the search reads a few cached numbers.
#pragma once

#include "grouped_gemm.cuh"
#include "grouped_gemm_sm90_tile.cuh"

namespace moe::cuda::sm90 {

struct TileAt {
  int expert;
  int first_row, rows;  // rows of the tile, at most TileSchedule::tile_rows
  int row_tile, column_tile;
};

class TileWalk {
 public:
  __device__ TileWalk(const TileSchedule& schedule, int num_experts, int column_tiles)
      : schedule_(schedule),
        num_experts_(num_experts),
        column_tiles_(column_tiles),
        row_tiles_(__ldg(schedule.first_tile + num_experts)),
        tile_rows_(static_cast<int>(schedule.tile_rows)),
        next_(blockIdx.x) {}

  // Called by whole warps.
  __device__ bool next(TileAt& at) {
    constexpr uint32_t kGroup = 8;
    if (next_ >= static_cast<uint32_t>(row_tiles_) * column_tiles_) return false;
    const uint32_t group = next_ / (kGroup * column_tiles_), inside = next_ % (kGroup * column_tiles_);
    const uint32_t rows_of_group = min(static_cast<int>(kGroup), row_tiles_ - static_cast<int>(group * kGroup));
    at.row_tile = group * kGroup + inside % rows_of_group;
    group_position_ = find(group_position_, group * kGroup);
    const int position = find(group_position_, at.row_tile);
    at.expert = __ldg(schedule_.order + position);
    const int end = __ldg(schedule_.offsets + at.expert + 1);
    at.first_row =
        __ldg(schedule_.offsets + at.expert) + (at.row_tile - __ldg(schedule_.first_tile + position)) * tile_rows_;
    at.rows = min(tile_rows_, end - at.first_row);
    at.column_tile = inside / rows_of_group;
    next_ += gridDim.x;
    return true;
  }

 private:
  // The last position at or after `from` whose first tile is not past `tile`.
  __device__ int find(int from, int tile) const {
    for (;;) {
      const int probe = from + 1 + threadIdx.x % 32;
      const bool passed = probe < num_experts_ && __ldg(schedule_.first_tile + probe) <= tile;
      const int count = __popc(__ballot_sync(0xffffffffu, passed));
      from += count;
      if (count < 32) return from;
    }
  }

  const TileSchedule& schedule_;
  const int num_experts_, column_tiles_, row_tiles_, tile_rows_;
  int group_position_ = 0;
  uint32_t next_;
};

}  // namespace moe::cuda::sm90
