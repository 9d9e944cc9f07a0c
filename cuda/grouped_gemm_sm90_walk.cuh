// Which tile is next: the persistent walk of a block over the tiles of all experts.
//
// Tiles come in groups of eight row tiles by all column tiles, so that what blocks work on at one time shares weights
// and rows in the L2 cache. The blocks of a cluster have neighbouring row tiles and the same column tile. Every warp
// walks by itself: the search reads a few cached numbers.
#pragma once

#include "grouped_gemm.cuh"
#include "grouped_gemm_sm90_tile.cuh"

namespace moe::cuda::sm90 {

struct TileAt {
  int expert;
  int first_row,
      rows;  // rows of the tile, at most TileSchedule::tile_rows; 0 when only the cluster's other block has one
  int row_tile, column_tile;
  bool is_shared;  // the expert is that of the cluster's other block
};

template <int kBlocks>
class TileWalk {
 public:
  __device__ TileWalk(const TileSchedule& schedule, int num_experts, int column_tiles)
      : schedule_(schedule),
        num_experts_(num_experts),
        column_tiles_(column_tiles),
        tile_rows_(static_cast<int>(schedule.tile_rows)) {}

  // Called by whole warps.
  __device__ bool next(TileAt& at) {
    constexpr uint32_t kGroup = 8 / kBlocks;
    const uint32_t next = (blockIdx.x + count_ * gridDim.x) / kBlocks;
    const int row_tiles = __ldg(schedule_.first_tile + num_experts_);
    const uint32_t row_groups = (row_tiles + kBlocks - 1) / kBlocks;  // of the row tiles of a cluster
    if (next >= row_groups * column_tiles_) return false;
    const uint32_t group = next / (kGroup * column_tiles_), inside = next % (kGroup * column_tiles_);
    const uint32_t size = min(kGroup, row_groups - group * kGroup);
    at.row_tile = (group * kGroup + inside % size) * kBlocks + blockIdx.x % kBlocks;
    at.column_tile = inside / size;
    group_position_ = find(group_position_, group * kGroup * kBlocks);
    const int position = find(group_position_, min(at.row_tile, row_tiles - 1));
    at.expert = __ldg(schedule_.order + position);
    const int first_tile = __ldg(schedule_.first_tile + position), end = __ldg(schedule_.offsets + at.expert + 1);
    at.first_row = __ldg(schedule_.offsets + at.expert) + (at.row_tile - first_tile) * tile_rows_;
    at.rows = max(min(tile_rows_, end - at.first_row), 0);
    at.is_shared = false;
    if constexpr (kBlocks > 1) {
      const int low = at.row_tile & ~1, high = low + (MOE_BUG(grouped_gemm_sm90, 30) ? 0 : 1);
      at.is_shared = low >= first_tile && high < __ldg(schedule_.first_tile + position + 1);
    }
    ++count_;
    return true;
  }

  // How many tiles the block had before this one.
  __device__ int before() const { return static_cast<int>(count_) - 1; }

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
  const int num_experts_, column_tiles_, tile_rows_;
  int group_position_ = 0;
  uint32_t count_ = 0;
};

}  // namespace moe::cuda::sm90
