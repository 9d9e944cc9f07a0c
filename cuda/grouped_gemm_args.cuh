// A task as the kernels that stage their tiles take it.
#pragma once

#include "epilogue.cuh"

namespace moe::cuda {

template <typename T>
struct GemmArgs {
  EpilogueArgs<T> epilogue;
  TileSchedule schedule;
  RowMap gather;
  const T *rows, *weight;
  int64_t num_rows, num_experts, n, k, column_tiles;

  // `columns` of C make a tile.
  GemmArgs(const GemmTask& task, int64_t columns)
      : epilogue(task),
        schedule(task.schedule),
        gather(task.gather),
        rows(static_cast<const T*>(task.rows)),
        weight(static_cast<const T*>(task.weight)),
        num_rows(task.num_rows),
        num_experts(task.num_experts),
        n(task.n),
        k(task.k),
        column_tiles(epilogue.column_tiles(columns)) {}

  int64_t most_tiles() const { return most_row_tiles(schedule, num_rows, num_experts) * column_tiles; }
};

template <typename T>
struct WgradArgs {
  EpilogueArgs<T> epilogue;
  TileSchedule schedule;
  RowMap lhs_gather, rhs_gather;
  const T *lhs, *rhs;
  int64_t num_experts, m, n, row_tiles, column_tiles;

  WgradArgs(const WgradTask& task, int64_t tile_rows, int64_t columns)
      : epilogue(task),
        schedule(task.schedule),
        lhs_gather(task.lhs_gather),
        rhs_gather(task.rhs_gather),
        lhs(static_cast<const T*>(task.lhs)),
        rhs(static_cast<const T*>(task.rhs)),
        num_experts(task.num_experts),
        m(task.m),
        n(task.n),
        row_tiles(ceil_div(task.m, tile_rows)),
        column_tiles(ceil_div(task.n, columns)) {}

  __host__ __device__ int64_t most_tiles() const { return num_experts * row_tiles * column_tiles; }
};

// A tile of a weight gradient: rows of M, columns of N, summed over `depth` rows from `begin` on.
struct WgradTile {
  int32_t expert;
  int64_t row, column_tile, begin, depth;
};

template <typename T>
__device__ __forceinline__ WgradTile find_wgrad_tile(const WgradArgs<T>& args, int tile_rows, int64_t work) {
  const int64_t tiles_of_expert = args.row_tiles * args.column_tiles;
  const int32_t expert = args.schedule.order[work / tiles_of_expert];
  const int64_t begin = args.schedule.offsets[expert];
  return {expert, work % tiles_of_expert / args.column_tiles * tile_rows, work % args.column_tiles, begin,
          args.schedule.offsets[expert + 1] - begin};
}

}  // namespace moe::cuda
