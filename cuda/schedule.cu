#include "grouped_gemm.cuh"
#include "launch.cuh"

namespace moe::cuda {
namespace {

constexpr int kMaxThreads = 1024;
constexpr int kMaxSorted = 4096;  // keys of 8 bytes fill 32 KiB of shared memory; more experts keep their own order

struct Max {
  static __device__ int32_t apply(int32_t a, int32_t b) { return a < b ? b : a; }
};
struct Sum {
  static __device__ int32_t apply(int32_t a, int32_t b) { return a + b; }
};

// The scan of `value` over the threads before this one, from `first`. `warps` has one element per warp.
template <typename Op>
__device__ int32_t exclusive_scan(int32_t value, int32_t first, int32_t* warps) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int32_t inclusive = value;
  for (int step = 1; step < 32; step *= 2) {
    const int32_t other = __shfl_up_sync(0xffffffffu, inclusive, step);
    if (lane >= step) inclusive = Op::apply(other, inclusive);
  }
  if (lane == 31) warps[warp] = inclusive;
  __syncthreads();
  int32_t before = first;
  for (int i = 0; i < warp; ++i) before = Op::apply(before, warps[i]);
  const int32_t previous = __shfl_up_sync(0xffffffffu, inclusive, 1);
  if (lane > 0) before = Op::apply(before, previous);
  __syncthreads();  // the next scan writes `warps`
  return before;
}

// One block. 1. offsets: a running maximum, clamped. 2. order: bitonic sort of (most rows, lowest id), a total order,
// so that the result does not depend on the algorithm. 3. first_tile: a prefix sum.
__global__ void __launch_bounds__(kMaxThreads)
    schedule_kernel(const int32_t* expert_offsets, int32_t num_rows, int32_t num_experts, int32_t num_keys,
                    int32_t tile_rows, int32_t* offsets, int32_t* order, int32_t* first_tile, int32_t* arrivals) {
  SMEM_DYN(uint64_t, keys);
  SMEM_ARRAY(int32_t, warps, 32);
  after_previous_kernel();
  const int32_t threads = blockDim.x, thread = threadIdx.x;
  const int32_t per_thread = (num_experts + threads) / threads;  // of the E + 1 offsets
  const int32_t begin = thread * per_thread, end = min(begin + per_thread, num_experts + 1);

  for (int32_t i = thread; i < kMostSplitTiles; i += threads) arrivals[i] = 0;
  int32_t largest = 0;
  for (int32_t i = begin; i < end; ++i) largest = Max::apply(largest, expert_offsets[i]);
  largest = exclusive_scan<Max>(largest, 0, warps);
  for (int32_t i = begin; i < end; ++i) {
    largest = Max::apply(largest, expert_offsets[i]);
    offsets[i] = min(largest, num_rows);
  }
  __syncthreads();

  const auto rows_of = [&](int32_t e) { return offsets[e + 1] - offsets[e]; };
  if (num_keys == 0) {
    for (int32_t e = thread; e < num_experts; e += threads) order[e] = e;
  } else {
    for (int32_t i = thread; i < num_keys; i += threads) {
      keys[i] = i < num_experts ? static_cast<uint64_t>(0x7fffffff - rows_of(i)) << 32 | static_cast<uint32_t>(i)
                                : ~uint64_t{0};
    }
    for (int32_t size = 2; size <= num_keys; size *= 2) {
      for (int32_t stride = size / 2; stride > 0; stride /= 2) {
        if (!MOE_BUG(grouped_gemm, 21)) __syncthreads();
        for (int32_t i = thread; i < num_keys / 2; i += threads) {
          const int32_t low = 2 * i - i % stride, high = low + stride;
          const bool ascending = (low & size) == 0;
          const uint64_t a = keys[low], b = keys[high];
          if ((a > b) == ascending) {
            keys[low] = b;
            keys[high] = a;
          }
        }
      }
    }
    __syncthreads();
    for (int32_t i = thread; i < num_experts; i += threads) order[i] = static_cast<int32_t>(keys[i] & 0xffffffffu);
  }
  if (!MOE_BUG(grouped_gemm, 22)) __syncthreads();  // `order` is written by others

  const auto tiles_of = [&](int32_t i) { return (rows_of(order[i]) + tile_rows - 1) / tile_rows; };
  const int32_t last = min(end, num_experts);
  int32_t tiles = 0;
  for (int32_t i = begin; i < last; ++i) tiles += tiles_of(i);
  tiles = exclusive_scan<Sum>(tiles, 0, warps);
  for (int32_t i = begin; i < end; ++i) {
    first_tile[i] = tiles;
    if (i < num_experts) tiles += tiles_of(i);
  }
}

}  // namespace

Status make_schedule(const int32_t* expert_offsets, int64_t num_rows, int64_t num_experts, int64_t tile_rows,
                     const CudaContext& cuda, TileSchedule* schedule) {
  auto* scratch = allocate<int32_t>(3 * num_experts + 2 + kMostSplitTiles, cuda);
  if (scratch == nullptr) return Status::kOutOfMemory;
  int32_t *offsets = scratch, *order = offsets + num_experts + 1, *first_tile = order + num_experts;
  int32_t* arrivals = first_tile + num_experts + 1;
  *schedule = {offsets, order, first_tile, tile_rows, arrivals};
  int64_t num_keys = 2;
  while (num_keys < num_experts) num_keys *= 2;
  const int64_t threads = num_keys < 32 ? 32 : num_keys < kMaxThreads ? num_keys : kMaxThreads;
  if (num_keys > kMaxSorted) num_keys = 0;
  LAUNCH(schedule_kernel, dim3(1), dim3(static_cast<unsigned>(threads)), static_cast<size_t>(num_keys) * 8,
         stream(cuda), expert_offsets, static_cast<int32_t>(num_rows), static_cast<int32_t>(num_experts),
         static_cast<int32_t>(num_keys), static_cast<int32_t>(tile_rows), offsets, order, first_tile, arrivals);
  return launched("schedule_kernel", cuda);
}

int64_t tile_rows_for(DType dtype, int64_t num_rows, int64_t num_experts) {
  return dtype == DType::kFloat64 || num_rows <= 64 * num_experts ? 64 : 128;
}

}  // namespace moe::cuda
