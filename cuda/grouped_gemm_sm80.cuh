// Grouped GEMM on the tensor cores by mma.sync: bf16, fp16 and tf32, every size and alignment, every GPU since Ampere.
//
// A tile is kRows x 128, by 8 warps of kRows / 2 x 32. Operands come by cp.async in 4 stages of 64 bytes of k.
// An operand is stored either along k, [row][64 bytes of k], or across it, [k][128 columns]; 16-byte chunks
// change places (XOR) so that the 8 rows that ldmatrix reads at once lie in different banks. Where rows do not start at
// multiples of 16 bytes, elements are copied one by one, at the same points of the pipeline.
#pragma once

#include "grouped_gemm_args.cuh"

namespace moe::cuda::sm80 {

constexpr int kColumns = 128, kWarpColumns = 32, kColumnBlocks = kWarpColumns / 8;
constexpr int kDepthBytes = 64;
constexpr int kStages = 4;  // the blocks of a multiprocessor then take at most 98 of the 100 KB that every Ampere has
template <typename T>
constexpr int kDepth = kDepthBytes / static_cast<int>(sizeof(T));  // elements of k in a stage
template <int kRows>
constexpr int kStageBytes = (kRows + kColumns) * kDepthBytes;
// Blocks that share a multiprocessor. Two of 128 rows would have 128 registers per thread, and spill.
template <int kRows>
constexpr int kBlocks = kRows == 64 ? 2 : 1;
constexpr int kSlabBytes = kSlabRows * kColumns * 4;
static_assert(kSlabBytes <= kStages * kStageBytes<64>, "the slab takes the place of the stages");

__device__ __forceinline__ void multiply_add(__nv_bfloat16, float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1) {
  ptx::mma_bf16_16816(d, a, b0, b1);
}
__device__ __forceinline__ void multiply_add(__half, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  ptx::mma_f16_16816(d, a, b0, b1);
}
__device__ __forceinline__ void multiply_add(float, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  ptx::mma_tf32_1688(d, a, b0, b1);
}

// One operand of kExtent rows (or columns) in a stage, from byte 0 of `Operand`'s part on.
template <typename T, int kExtent, bool kAlongK>
struct Operand {
  static constexpr int kChunks = kExtent * kDepthBytes / kPieceBytes / kGemmThreads;  // of a thread
  static constexpr int kPerRow = kAlongK ? kDepthBytes / kPieceBytes : kExtent / kPiece<T>;
  static_assert(kChunks >= 1, "every thread copies something");

  // Byte of chunk `chunk` of row `row`; a row is one of the operand's when along k, else one of k.
  static __device__ __forceinline__ uint32_t place(int row, int chunk) {
    if constexpr (kAlongK)
      return row * kDepthBytes + ((chunk ^ ((row >> 1) & 3)) * kPieceBytes);
    else if constexpr (sizeof(T) == 2)
      return row * (kPerRow * kPieceBytes) + ((chunk ^ (row & 7)) * kPieceBytes);
    else  // read element by element: 4 rows of k by 8 columns at once
      return row * (kPerRow * kPieceBytes) + ((chunk ^ ((row & 3) * 2)) * kPieceBytes);
  }
  static __device__ __forceinline__ int row_of(int n) {
    return (static_cast<int>(threadIdx.x) + n * kGemmThreads) / kPerRow;
  }
  static __device__ __forceinline__ int chunk_of(int n) {
    return (static_cast<int>(threadIdx.x) + n * kGemmThreads) % kPerRow;
  }

  // Copies one chunk, of which `count` elements exist.
  static __device__ __forceinline__ void copy(unsigned char* shared, int n, const T* from, int64_t count, bool whole,
                                              const T* somewhere) {
    unsigned char* to = shared + place(row_of(n), chunk_of(n));
    if (whole) {
      ptx::cp_async16(ptx::smem_u32(to), count > 0 ? from : somewhere, count > 0 ? kPieceBytes : 0);
      return;
    }
    T parts[kPiece<T>];
#pragma unroll
    for (int i = 0; i < kPiece<T>; ++i) parts[i] = i < count ? from[i] : narrow<T>(0.0f);
    uint4 bits;
    memcpy(&bits, parts, sizeof(bits));
    *reinterpret_cast<uint4*>(to) = bits;
  }

  // Four registers of fragments for 16 rows (of A) or 16 columns (of B) from `first` on, k-step `step` of 32 bytes.
  // kIsA: rows 0-7 and 8-15 alternate fastest, as mma wants A; else the halves of k do, as two B fragments.
  template <bool kIsA>
  static __device__ __forceinline__ void fragments(const unsigned char* shared, int first, int step, uint32_t (&r)[4]) {
    const int lane = static_cast<int>(threadIdx.x) % 32, low = lane / 8 % 2, high = lane / 16;
    const int extent_half = kIsA ? low : high, k_half = kIsA ? high : low;
    if constexpr (kAlongK) {
      ptx::ldmatrix_x4(r, ptx::smem_u32(shared + place(first + extent_half * 8 + lane % 8, step * 2 + k_half)));
    } else if constexpr (sizeof(T) == 2) {
      ptx::ldmatrix_x4_trans(r,
                             ptx::smem_u32(shared + place(step * 16 + k_half * 8 + lane % 8, first / 8 + extent_half)));
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int column = first + lane / 4 + 8 * (kIsA ? i & 1 : i >> 1);
        const int k = step * 8 + lane % 4 + 4 * (kIsA ? i >> 1 : i & 1);
        r[i] = *reinterpret_cast<const uint32_t*>(shared + place(k, column / 4) + column % 4 * 4);
      }
    }
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (uint32_t& x : r) x = ptx::to_tf32(__uint_as_float(x));
    }
  }
};

template <int kRows>
struct Tile {
  static constexpr int kWarpRows = kRows / 2, kRowBlocks = kWarpRows / 16;
  float sum[kRowBlocks][kColumnBlocks][4];
};

// tile.sum = lhs rhs^T over `depth` of k. copy_lhs(shared, k) and copy_rhs(shared, k) queue the thread's chunks of the
// stage that begins at k.
template <typename T, int kRows, bool kLhsAlongK, bool kRhsAlongK, typename CopyLhs, typename CopyRhs>
__device__ __forceinline__ void multiply(Tile<kRows>& tile, unsigned char* shared, int64_t depth,
                                         const CopyLhs& copy_lhs, const CopyRhs& copy_rhs) {
  using Lhs = Operand<T, kRows, kLhsAlongK>;
  using Rhs = Operand<T, kColumns, kRhsAlongK>;
  constexpr int kLhsBytes = kRows * kDepthBytes;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int first_row = warp % 2 * Tile<kRows>::kWarpRows, first_column = warp / 2 * kWarpColumns;
#pragma unroll
  for (auto& row : tile.sum) {
#pragma unroll
    for (auto& block : row) {
#pragma unroll
      for (float& sum : block) sum = 0;
    }
  }
  const auto copy = [&](int64_t k, int stage) {
    if (k < depth) {
      unsigned char* at = shared + stage * kStageBytes<kRows>;
      copy_lhs(at, k);
      copy_rhs(at + kLhsBytes, k);
    }
    ptx::cp_async_commit();  // also an empty group: the waits count groups
  };
  // One loop for the start and the rest, so that the copying code, long where it goes element by element, is there
  // once.
  const int64_t ahead = int64_t{kStages - 1} * kDepth<T>;
  int reading = 0, writing = 0;
  for (int64_t k = -ahead; k < depth; k += kDepth<T>) {
    if (MOE_BUG(grouped_gemm, 12)) copy(k + ahead, writing);
    if (k >= 0) {
      if (MOE_BUG(grouped_gemm, 11))
        ptx::cp_async_wait<kStages - 1>();
      else
        ptx::cp_async_wait<kStages - 2>();
      if (!MOE_BUG(grouped_gemm, 13)) __syncthreads();  // this stage is there for all, and the one before is free
    }
    if (!MOE_BUG(grouped_gemm, 12)) copy(k + ahead, writing);
    writing = writing + 1 == kStages ? 0 : writing + 1;
    if (k < 0) continue;
    const unsigned char *lhs = shared + reading * kStageBytes<kRows>, *rhs = lhs + kLhsBytes;
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      uint32_t a[Tile<kRows>::kRowBlocks][4], b[kColumnBlocks / 2][4];
#pragma unroll
      for (int i = 0; i < Tile<kRows>::kRowBlocks; ++i) {
        Lhs::template fragments<true>(lhs, first_row + i * 16, step, a[i]);
      }
#pragma unroll
      for (int j = 0; j < kColumnBlocks / 2; ++j) {
        Rhs::template fragments<false>(rhs, first_column + j * 16, step, b[j]);
      }
#pragma unroll
      for (int i = 0; i < Tile<kRows>::kRowBlocks; ++i) {
#pragma unroll
        for (int j = 0; j < kColumnBlocks; ++j) {
          multiply_add(T{}, tile.sum[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
        }
      }
    }
    reading = reading + 1 == kStages ? 0 : reading + 1;
  }
  ptx::cp_async_wait<0>();
}

// Hands the tile to the epilogue, slab by slab.
template <bool kStores, typename T, int kRows>
__device__ __forceinline__ void finish(const Tile<kRows>& tile, unsigned char* shared, const EpilogueArgs<T>& args,
                                       int64_t first_row, int64_t rows, int32_t expert, int64_t column_tile) {
  constexpr int kSlabs = kRows / kSlabRows;
  float* slab = reinterpret_cast<float*>(shared);
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  for (int part = 0; part < kSlabs; ++part) {
    if (!MOE_BUG(grouped_gemm, 14)) __syncthreads();  // the stages, or the slab before, have been read
    if (kSlabs == 1 || warp % 2 == part) {
      const int warp_row = kSlabs == 1 ? warp % 2 * Tile<kRows>::kWarpRows : 0;
#pragma unroll
      for (int i = 0; i < Tile<kRows>::kRowBlocks; ++i) {
#pragma unroll
        for (int j = 0; j < kColumnBlocks; ++j) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int row = warp_row + i * 16 + half * 8 + lane / 4, column = warp / 2 * kWarpColumns + j * 8;
            *reinterpret_cast<float2*>(slab_place<float, kColumns>(slab, row, column) + lane % 4 * 2) =
                make_float2(tile.sum[i][j][half * 2], tile.sum[i][j][half * 2 + 1]);
          }
        }
      }
    }
    if (!MOE_BUG(grouped_gemm, 15)) __syncthreads();
    const int64_t left = rows - part * kSlabRows;
    finish_slab<T, kColumns, kGemmThreads, kStores>(&args, slab, first_row + part * kSlabRows,
                                                    left < kSlabRows ? left : kSlabRows, expert, column_tile);
  }
  if (!MOE_BUG(grouped_gemm, 16)) __syncthreads();  // the next tile's copies take the place of the slab
}

template <typename T, int kRows, WeightLayout kLayout>
__global__ void __launch_bounds__(kGemmThreads, kBlocks<kRows>)
    gemm_kernel(const __grid_constant__ GemmArgs<T> args, bool whole_rows, bool whole_weight) {
  SMEM_DYN(unsigned char, shared);
  constexpr bool kOutIn = kLayout == WeightLayout::kOutIn;
  using Lhs = Operand<T, kRows, true>;
  using Rhs = Operand<T, kColumns, kOutIn>;
  const int64_t tiles = count_tiles(args.schedule, args.num_experts) * args.column_tiles;
  for (int64_t work = blockIdx.x; work < tiles; work += gridDim.x) {
    const auto at = find_tile(args.schedule, args.num_experts, args.column_tiles, work);
    const ColumnTile columns = args.epilogue.template columns<kColumns>(at.column_tile);
    const T* weight = args.weight + at.expert * args.n * args.k;
    const T *row_of_lhs[Lhs::kChunks], *row_of_rhs[Rhs::kChunks];  // null: zeros
#pragma unroll
    for (int n = 0; n < Lhs::kChunks; ++n) {
      const int row = Lhs::row_of(n);
      const int64_t source = row < at.rows ? args.gather.source(at.first_row + row) : -1;
      row_of_lhs[n] = source < 0 ? nullptr : args.rows + source * args.k + Lhs::chunk_of(n) * kPiece<T>;
    }
#pragma unroll
    for (int n = 0; n < Rhs::kChunks; ++n) {
      const int column = kOutIn ? Rhs::row_of(n) : Rhs::chunk_of(n) * kPiece<T>;
      const int64_t offset = kOutIn ? columns.column(column) * args.k + Rhs::chunk_of(n) * kPiece<T>
                                    : Rhs::row_of(n) * args.n + columns.column(column);
      row_of_rhs[n] = columns.left(column) <= 0 ? nullptr : weight + offset;
    }
    Tile<kRows> tile;
    multiply<T, kRows, true, kOutIn>(
        tile, shared, args.k,
        [&](unsigned char* to, int64_t k) {
#pragma unroll
          for (int n = 0; n < Lhs::kChunks; ++n) {
            const int64_t count = row_of_lhs[n] == nullptr ? 0 : args.k - k - Lhs::chunk_of(n) * kPiece<T>;
            Lhs::copy(to, n, row_of_lhs[n] + k, count, whole_rows, args.rows);
          }
        },
        [&](unsigned char* to, int64_t k) {
#pragma unroll
          for (int n = 0; n < Rhs::kChunks; ++n) {
            int64_t count = 0;
            if (row_of_rhs[n] == nullptr)
              count = 0;
            else if constexpr (kOutIn)
              count = args.k - k - Rhs::chunk_of(n) * kPiece<T>;
            else
              count = k + Rhs::row_of(n) < args.k ? columns.left(Rhs::chunk_of(n) * kPiece<T>) : 0;
            Rhs::copy(to, n, row_of_rhs[n] + (kOutIn ? k : k * args.n), count, whole_weight, args.weight);
          }
        });
    finish<false>(tile, shared, args.epilogue, at.first_row, at.rows, at.expert, at.column_tile);
  }
  zero_unowned_rows(&args.epilogue, &args.schedule, args.num_rows, args.num_experts);
}

template <typename T>
__global__ void __launch_bounds__(kGemmThreads, kBlocks<128>)
    wgrad_kernel(const __grid_constant__ WgradArgs<T> args, bool whole_lhs, bool whole_rhs) {
  SMEM_DYN(unsigned char, shared);
  constexpr int kRows = 128;
  using Side = Operand<T, 128, false>;
  for (int64_t work = blockIdx.x; work < args.most_tiles(); work += gridDim.x) {
    const WgradTile at = find_wgrad_tile(args, kRows, work);
    if (args.epilogue.accumulate && at.depth == 0) continue;
    const auto copy_side = [&](unsigned char* to, int64_t k, const T* matrix, const RowMap& gather, int64_t width,
                               int64_t first, bool whole) {
#pragma unroll
      for (int n = 0; n < Side::kChunks; ++n) {
        const int64_t column = first + Side::chunk_of(n) * kPiece<T>, row = k + Side::row_of(n);
        const int64_t source = row < at.depth && column < width ? gather.source(at.begin + row) : -1;
        Side::copy(to, n, matrix + source * width + column, source < 0 ? 0 : width - column, whole, matrix);
      }
    };
    Tile<kRows> tile;
    multiply<T, kRows, false, false>(
        tile, shared, at.depth,
        [&](unsigned char* to, int64_t k) { copy_side(to, k, args.lhs, args.lhs_gather, args.m, at.row, whole_lhs); },
        [&](unsigned char* to, int64_t k) {
          copy_side(to, k, args.rhs, args.rhs_gather, args.n, at.column_tile * kColumns, whole_rhs);
        });
    const int64_t left = args.m - at.row;
    finish<true>(tile, shared, args.epilogue, at.expert * args.m + at.row, left < kRows ? left : kRows, at.expert,
                 at.column_tile);
  }
}

template <int kRows, typename Kernel, typename Args>
Status launch(Kernel* kernel, const char* name, const Args& args, bool whole_lhs, bool whole_rhs,
              const CudaContext& cuda) {
  constexpr size_t kBytes = kStages * kStageBytes<kRows>;
  unsigned blocks = 0;
  Status status = persistent_blocks(args.most_tiles(), kBlocks<kRows>, cuda, blocks);
  if (status == Status::kOk) status = allow_shared_memory(kernel, kBytes, name, cuda);
  if (status != Status::kOk) return status;
  LAUNCH(kernel, dim3(blocks), dim3(kGemmThreads), kBytes, stream(cuda), args, whole_lhs, whole_rhs);
  return launched(name, cuda);
}

template <typename T, int kRows>
Status launch_gemm(const GemmTask& task, const CudaContext& cuda) {
  const GemmArgs<T> args(task, kColumns);
  const int64_t bytes = sizeof(T);
  const bool out_in = task.weight_layout == WeightLayout::kOutIn;
  const bool whole_rows = fits_pieces(task.k * bytes, task.rows);
  const bool whole_weight = fits_pieces((out_in                 ? task.k
                                         : args.epilogue.paired ? task.n / 2
                                                                : task.n) *
                                            bytes,
                                        task.weight);
  return launch<kRows>(
      out_in ? gemm_kernel<T, kRows, WeightLayout::kOutIn> : gemm_kernel<T, kRows, WeightLayout::kInOut>, "gemm_sm80",
      args, whole_rows, whole_weight, cuda);
}

template <typename T>
Status run_gemm(const GemmTask& task, const CudaContext& cuda) {
  return task.schedule.tile_rows == 64 ? launch_gemm<T, 64>(task, cuda) : launch_gemm<T, 128>(task, cuda);
}

template <typename T>
Status run_wgrad(const WgradTask& task, const CudaContext& cuda) {
  const int64_t bytes = sizeof(T);
  return launch<128>(wgrad_kernel<T>, "wgrad_sm80", WgradArgs<T>(task, 128, kColumns),
                     fits_pieces(task.m * bytes, task.lhs), fits_pieces(task.n * bytes, task.rhs), cuda);
}

}  // namespace moe::cuda::sm80
