// Grouped GEMM on the scalar FMA units: fp32 computed in fp32, and fp64; every size and alignment.
//
// 256 threads as 16 x 16; a thread has groups of 4 x 4 elements, 64 rows or 64 columns apart. Operands go through
// registers into shared memory as [k][row] and [k][column], while the FMAs work on the block before.
#pragma once

#include "grouped_gemm_args.cuh"

namespace moe::cuda::simt {

constexpr int kDepth = 16;  // of a block of k
constexpr int kGroup = 4;

// A slab of either fills 32 KiB.
template <typename T>
constexpr int kTileColumns = sizeof(T) == 8 ? 64 : 128;
template <typename T>
constexpr int kMostTileRows = sizeof(T) == 8 ? 64 : 128;

// Shared memory: two operand blocks, then, in the same place, a slab.
template <typename T, int kRows>
struct Tile {
  static constexpr int kColumns = kTileColumns<T>;
  static constexpr int kRowGroups = kRows / 64, kColumnGroups = kColumns / 64;
  static constexpr int kRowPitch = kRows + kGroup, kColumnPitch = kColumns + kGroup;  // less bank conflicts
  static constexpr int64_t kOperandBytes = sizeof(T) * kDepth * (kRowPitch + kColumnPitch);
  static constexpr int64_t kSlabBytes = sizeof(T) * kSlabRows * kColumns;
  static constexpr int64_t kBytes = kOperandBytes > kSlabBytes ? kOperandBytes : kSlabBytes;
  static_assert(kBytes <= kPlainSharedBytes, "the launch does not ask for more shared memory");

  T sum[kRowGroups * kGroup][kColumnGroups * kGroup];
};

// One operand's part of a block: element (i, k) for i < kExtent. kAlongK: neighbouring threads read along k.
template <typename T, int kExtent, bool kAlongK>
struct Operand {
  static constexpr int kCount = kExtent * kDepth / kGemmThreads, kPitch = kExtent + kGroup;
  T values[kCount];

  template <typename Fn>
  static __device__ __forceinline__ void for_places(const Fn& fn) {
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
      const int place = static_cast<int>(threadIdx.x) + n * kGemmThreads;
      if constexpr (kAlongK)
        fn(n, place / kDepth, place % kDepth);
      else
        fn(n, place % kExtent, place / kExtent);
    }
  }
  template <typename Read>
  __device__ __forceinline__ void load(int64_t k, const Read& read) {
    for_places([&](int n, int i, int depth) { values[n] = read(i, k + depth); });
  }
  __device__ __forceinline__ void put(T* shared) const {
    for_places([&](int n, int i, int depth) { shared[depth * kPitch + i] = values[n]; });
  }
};

// tile.sum = sum over k < depth of lhs(i, k) rhs(j, k); both return 0 outside of the matrices.
template <bool kLhsAlongK, bool kRhsAlongK, typename T, int kRows, typename Lhs, typename Rhs>
__device__ __forceinline__ void multiply(Tile<T, kRows>& tile, T* shared, int64_t depth, const Lhs& lhs,
                                         const Rhs& rhs) {
  using Shape = Tile<T, kRows>;
  T *shared_lhs = shared, *shared_rhs = shared + kDepth * Shape::kRowPitch;
  const int x = static_cast<int>(threadIdx.x) % 16, y = static_cast<int>(threadIdx.x) / 16;
  Operand<T, kRows, kLhsAlongK> a;
  Operand<T, Shape::kColumns, kRhsAlongK> b;
#pragma unroll
  for (auto& row : tile.sum) {
#pragma unroll
    for (T& sum : row) sum = 0;
  }
  if (depth > 0) {
    a.load(0, lhs);
    b.load(0, rhs);
  }
  for (int64_t k = 0; k < depth; k += kDepth) {
    if (!MOE_BUG(grouped_gemm, 1)) __syncthreads();  // the block before, or a slab, has been read
    a.put(shared_lhs);
    b.put(shared_rhs);
    if (!MOE_BUG(grouped_gemm, 2)) __syncthreads();
    if (k + kDepth < depth) {
      a.load(k + kDepth, lhs);
      b.load(k + kDepth, rhs);
    }
#pragma unroll 4
    for (int d = 0; d < kDepth; ++d) {
      T left[Shape::kRowGroups * kGroup], right[Shape::kColumnGroups * kGroup];
#pragma unroll
      for (int i = 0; i < Shape::kRowGroups * kGroup; ++i) {
        left[i] = shared_lhs[d * Shape::kRowPitch + i / kGroup * 64 + y * kGroup + i % kGroup];
      }
#pragma unroll
      for (int j = 0; j < Shape::kColumnGroups * kGroup; ++j) {
        right[j] = shared_rhs[d * Shape::kColumnPitch + j / kGroup * 64 + x * kGroup + j % kGroup];
      }
#pragma unroll
      for (int i = 0; i < Shape::kRowGroups * kGroup; ++i) {
#pragma unroll
        for (int j = 0; j < Shape::kColumnGroups * kGroup; ++j) tile.sum[i][j] += left[i] * right[j];
      }
    }
  }
}

// Hands the tile to the epilogue, slab by slab.
template <bool kStores, typename T, int kRows>
__device__ __forceinline__ void finish(const Tile<T, kRows>& tile, T* slab, const EpilogueArgs<T>& args,
                                       int64_t first_row, int64_t rows, int32_t expert, int64_t column_tile) {
  using Shape = Tile<T, kRows>;
  const int x = static_cast<int>(threadIdx.x) % 16, y = static_cast<int>(threadIdx.x) / 16;
#pragma unroll
  for (int group = 0; group < Shape::kRowGroups; ++group) {
    if (!MOE_BUG(grouped_gemm, 3)) __syncthreads();  // the operands, or the slab before, have been read
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
#pragma unroll
      for (int j = 0; j < Shape::kColumnGroups * kGroup; ++j) {
        const int column = j / kGroup * 64 + x * kGroup + j % kGroup;
        *slab_place<T, Shape::kColumns>(slab, y * kGroup + i, column) = tile.sum[group * kGroup + i][j];
      }
    }
    if (!MOE_BUG(grouped_gemm, 4)) __syncthreads();
    const int64_t left = rows - group * kSlabRows;
    finish_slab<T, Shape::kColumns, kGemmThreads, kStores>(&args, slab, first_row + group * kSlabRows,
                                                           left < kSlabRows ? left : kSlabRows, expert, column_tile);
  }
}

template <typename T, int kRows, WeightLayout kLayout>
__global__ void __launch_bounds__(kGemmThreads, 1) gemm_kernel(const __grid_constant__ GemmArgs<T> args) {
  SMEM_DYN(T, shared);
  SMEM_ARRAY(int64_t, sources, kRows);  // the row of `rows` that each row of the tile is, or -1
  using Shape = Tile<T, kRows>;
  constexpr bool kOutIn = kLayout == WeightLayout::kOutIn;
  const int64_t tiles = count_tiles(args.schedule, args.num_experts) * args.column_tiles;
  for (int64_t work = blockIdx.x; work < tiles; work += gridDim.x) {
    const auto at = find_tile(args.schedule, args.num_experts, args.column_tiles, work);
    const ColumnTile columns = args.epilogue.template columns<Shape::kColumns>(at.column_tile);
    const T* weight = args.weight + at.expert * args.n * args.k;
    const int thread = static_cast<int>(threadIdx.x);
    if (thread < kRows) sources[thread] = thread < at.rows ? args.gather.source(at.first_row + thread) : -1;
    if (!MOE_BUG(grouped_gemm, 5)) __syncthreads();
    Tile<T, kRows> tile;
    multiply<true, kOutIn>(
        tile, shared, args.k,
        [&](int i, int64_t k) { return k < args.k && sources[i] >= 0 ? args.rows[sources[i] * args.k + k] : T{0}; },
        [&](int j, int64_t k) {
          if (k >= args.k || columns.left(j) <= 0) return T{0};
          return weight[kOutIn ? columns.column(j) * args.k + k : k * args.n + columns.column(j)];
        });
    finish<false>(tile, shared, args.epilogue, at.first_row, at.rows, at.expert, at.column_tile);
  }
  zero_unowned_rows(&args.epilogue, &args.schedule, args.num_rows, args.num_experts);
}

template <typename T>
__global__ void __launch_bounds__(kGemmThreads, 1) wgrad_kernel(const __grid_constant__ WgradArgs<T> args) {
  SMEM_DYN(T, shared);
  constexpr int kRows = kMostTileRows<T>;
  using Shape = Tile<T, kRows>;
  for (int64_t work = blockIdx.x; work < args.most_tiles(); work += gridDim.x) {
    const auto [expert, row, column_tile, begin, depth] = find_wgrad_tile(args, kRows, work);
    if (args.epilogue.accumulate && depth == 0) continue;
    const auto read = [&, begin = begin, depth = depth](const T* matrix, const RowMap& gather, int64_t width,
                                                        int64_t column, int64_t k) {
      if (column >= width || k >= depth) return T{0};
      const int64_t source = gather.source(begin + k);
      return source < 0 ? T{0} : matrix[source * width + column];
    };
    Tile<T, kRows> tile;
    multiply<false, false>(
        tile, shared, depth, [&](int i, int64_t k) { return read(args.lhs, args.lhs_gather, args.m, row + i, k); },
        [&, column_tile = column_tile](int j, int64_t k) {
          return read(args.rhs, args.rhs_gather, args.n, column_tile * Shape::kColumns + j, k);
        });
    const int64_t left = args.m - row;
    finish<true>(tile, shared, args.epilogue, expert * args.m + row, left < kRows ? left : kRows, expert, column_tile);
  }
}

template <typename T, int kRows, WeightLayout kLayout>
Status launch_gemm(const GemmTask& task, const CudaContext& cuda) {
  const GemmArgs<T> args(task, kTileColumns<T>);
  unsigned blocks = 0;
  if (const Status status = persistent_blocks(args.most_tiles(), 2, cuda, blocks); status != Status::kOk) return status;
  LAUNCH((gemm_kernel<T, kRows, kLayout>), dim3(blocks), dim3(kGemmThreads), (Tile<T, kRows>::kBytes), stream(cuda),
         args);
  return launched("gemm_simt", cuda);
}

template <typename T>
Status launch_wgrad(const WgradTask& task, const CudaContext& cuda) {
  constexpr int kRows = kMostTileRows<T>;
  const WgradArgs<T> args(task, kRows, kTileColumns<T>);
  unsigned blocks = 0;
  if (const Status status = persistent_blocks(args.most_tiles(), 2, cuda, blocks); status != Status::kOk) return status;
  LAUNCH(wgrad_kernel<T>, dim3(blocks), dim3(kGemmThreads), (Tile<T, kRows>::kBytes), stream(cuda), args);
  return launched("wgrad_simt", cuda);
}

}  // namespace moe::cuda::simt
