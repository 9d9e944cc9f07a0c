// From accumulators to global memory: 64 x 64 slabs of results in shared memory, then TMA, or predicated 16-byte stores
// for the rows at an expert's end.
#pragma once

#include "grouped_gemm_sm90_tile.cuh"

namespace moe::cuda::sm90 {

// Two neighbouring values as one word.
template <typename T>
__device__ __forceinline__ uint32_t pack(float x, float y);
template <>
__device__ __forceinline__ uint32_t pack<__nv_bfloat16>(float x, float y) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(x, y);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
template <>
__device__ __forceinline__ uint32_t pack<__half>(float x, float y) {
  const __half2 pair = __floats2half2_rn(x, y);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

template <typename T>
__device__ __forceinline__ float2 unpack(uint32_t pair);
template <>
__device__ __forceinline__ float2 unpack<__nv_bfloat16>(uint32_t pair) {
  return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&pair));
}
template <>
__device__ __forceinline__ float2 unpack<__half>(uint32_t pair) {
  return __half22float2(*reinterpret_cast<const __half2*>(&pair));
}

// The place of sums 4 j + 2 h and 4 j + 2 h + 1 of an m64 wgmma in its 64 rows: row(h), columns column(j) and the next.
__device__ __forceinline__ int sum_row(int h) {
  return static_cast<int>(threadIdx.x) % kGroupThreads / 32 * 16 + h * 8 + static_cast<int>(threadIdx.x) % 32 / 4;
}
__device__ __forceinline__ int sum_column(int j) { return j * 8 + static_cast<int>(threadIdx.x) % 4 * 2; }

// The 4-byte word of shared memory that holds those two columns (0 <= j < 8).
__device__ __forceinline__ uint32_t* slab_word(unsigned char* slab, int h, int j) {
  return reinterpret_cast<uint32_t*>(slab + swizzled(sum_row(h), j) + static_cast<int>(threadIdx.x) % 4 * 4);
}

// Where a matrix [rows, parts, columns] goes; parts is 2 for the gate and the up half of a row, cut each at its own
// end.
template <typename T>
struct Destination {
  const CUtensorMap* map;
  T* data;
  int64_t row_stride;    // elements
  int64_t part_columns;  // elements
};

// The barrier of one math warpgroup; 0 is __syncthreads.
__device__ __forceinline__ void group_sync(int group) { ptx::bar_sync(1 + group, kGroupThreads); }
__device__ __forceinline__ bool is_group_leader() { return threadIdx.x % kGroupThreads == 0; }

// Makes what the warpgroup wrote to its slabs visible to TMA and to all its threads.
__device__ __forceinline__ void publish(int group) {
  if (!MOE_BUG(grouped_gemm_sm90, 17)) ptx::fence_proxy_async();
  if (!MOE_BUG(grouped_gemm_sm90, 18)) group_sync(group);
}

// Stores the first `rows` rows of a published slab at (row, part, column).
template <typename T>
__device__ __forceinline__ void send(const unsigned char* slab, const Destination<T>& to, int row, int rows, int part,
                                     int64_t column) {
  if (rows >= kGroupRows) {
    if (is_group_leader()) ptx::tma_store_3d(to.map, ptx::smem_u32(slab), static_cast<int>(column), part, row);
    return;
  }
  const int piece = threadIdx.x % 8;
  const int at = static_cast<int>(column) + piece * 8;
  if (at >= static_cast<int>(to.part_columns)) return;
  const int stored = rows + (MOE_BUG(grouped_gemm_sm90, 19) ? 1 : 0);
#pragma unroll 1  // rare, and unrolled it takes registers from the main loop
  for (int r = static_cast<int>(threadIdx.x) % kGroupThreads / 8; r < stored; r += kGroupThreads / 8) {
    *reinterpret_cast<uint4*>(to.data + (row + r) * to.row_stride + part * to.part_columns + at) =
        *reinterpret_cast<const uint4*>(slab + swizzled(r, piece));
  }
}

// The slabs of one math warpgroup, used in turn. Every slab is one TMA group, an empty one when its rows were stored by
// threads, so that a wait can count slabs.
template <typename Tile>
class Slabs {
 public:
  __device__ Slabs(Shared<Tile>& shared, int group) : slabs_(shared.slab[group]), group_(group) {}

  // Stores 64 columns of which fill(slab) writes the values.
  template <typename T, typename Fill>
  __device__ __forceinline__ void store(const Destination<T>& to, int row, int rows, int part, int64_t column,
                                        const Fill& fill) {
    with_slab([&](unsigned char* slab) {
      fill(slab);
      publish(group_);
      send(slab, to, row, rows, part, column);
    });
  }

  // The same at TMA coordinates, for a tensor whose edges the map knows.
  template <typename T, typename Fill>
  __device__ __forceinline__ void store_at(const Destination<T>& to, int x, int y, int z, const Fill& fill) {
    with_slab([&](unsigned char* slab) {
      fill(slab);
      publish(group_);
      if (is_group_leader()) ptx::tma_store_3d(to.map, ptx::smem_u32(slab), x, y, z);
    });
  }

 private:
  template <typename Fn>
  __device__ __forceinline__ void with_slab(const Fn& fn) {
    unsigned char* slab = slabs_[next_];
    next_ = next_ + 1 == Tile::kSlabs ? 0 : next_ + 1;
    if (!MOE_BUG(grouped_gemm_sm90, 20) && is_group_leader()) ptx::tma_store_wait_read<Tile::kSlabs - 1>();
    if (!MOE_BUG(grouped_gemm_sm90, 21)) group_sync(group_);
    fn(slab);
    if (is_group_leader()) ptx::tma_store_commit();
  }

  unsigned char (*slabs_)[kSlabBytes];
  const int group_;
  int next_ = 0;
};

// Fills a slab with the 32 sums of its 64 columns. Lane 8 i + r gives the place of row r of the i-th of the four 8 x 8
// matrices that an instruction stores: rows r and r + 8 of two neighbouring pieces.
template <typename T, int kFirst, int kSums>
__device__ __forceinline__ void fill_slab(unsigned char* slab, const float (&sums)[kSums]) {
  const int lane = threadIdx.x % 32, row = static_cast<int>(threadIdx.x) % kGroupThreads / 32 * 16 + lane % 16;
#pragma unroll
  for (int j = 0; j < 8; j += 2) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int sum = kFirst + 4 * (j + i / 2) + 2 * (i % 2);
      words[i] = pack<T>(sums[sum], sums[sum + 1]);
    }
    const int piece = j + (MOE_BUG(grouped_gemm_sm90, 27) ? 0 : lane / 16);
    ptx::stmatrix_x4(ptx::smem_u32(slab + swizzled(row, piece)), words);
  }
}

// Zeros in rows [first, num_rows) of a matrix of 16-byte aligned rows; by the math threads of all blocks.
__device__ inline void zero_rows(void* data, int64_t row_bytes, int64_t first, int64_t num_rows) {
  if (data == nullptr) return;
  uint4* pieces = static_cast<uint4*>(data);
  const int64_t per_row = row_bytes / 16, threads = int64_t{gridDim.x} * kMathGroups * kGroupThreads;
  const int64_t thread = int64_t{blockIdx.x} * kMathGroups * kGroupThreads + threadIdx.x - kGroupThreads;
  for (int64_t i = first * per_row + thread; i < num_rows * per_row; i += threads) pieces[i] = uint4{0, 0, 0, 0};
}

}  // namespace moe::cuda::sm90
