// The gradient of every expert's bias: output[e] = sum over the rows r of e of w_r rows[r].
//
// Launch 1 sums the rows of each tile of the schedule, launch 2 the tiles of each expert, both in ascending order, so
// an expert that has all the rows still feeds every SM. The sums of the tiles cost 1 / tile_rows of the traffic.
#include "grouped_gemm.cuh"
#include "plan_view.cuh"

namespace moe::cuda {
namespace {

constexpr int kWarps = 8;     // of a block: warp w sums the rows w, w + kWarps, .. of its tile
constexpr int kInFlight = 4;  // rows

// The largest i < num_experts with first_tile[i] <= tile.
__device__ __forceinline__ int64_t place_of_tile(const TileSchedule& schedule, int64_t num_experts, int64_t tile) {
  int64_t low = 0, high = num_experts;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (schedule.first_tile[middle] <= tile ? low : high) = middle;
  }
  return low;
}

// partials: [tiles, N].
template <typename T, int kCount>
__global__ void __launch_bounds__(32 * kWarps) bgrad_tile_kernel(Wide<T>* partials, BgradTask task) {
  using Real = Wide<T>;
  SMEM_ARRAY(Real, sums, kWarps * 32 * kCount);
  const int64_t tile = blockIdx.x, n = task.n;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t column = (int64_t{blockIdx.y} * 32 + lane) * kCount;
  if (tile >= task.schedule.first_tile[task.num_experts]) return;
  const int64_t place = place_of_tile(task.schedule, task.num_experts, tile);
  const int64_t expert = task.schedule.order[place];
  const int64_t begin =
      task.schedule.offsets[expert] + (tile - task.schedule.first_tile[place]) * task.schedule.tile_rows;
  const int64_t end = at_most(begin + task.schedule.tile_rows, task.schedule.offsets[expert + 1]);

  const T* rows = static_cast<const T*>(task.rows);
  const Real* weights = static_cast<const Real*>(task.row_weights);
  Real sum[kCount] = {};
  for (int64_t first = begin + warp; first < end; first += kWarps * kInFlight) {
    Bits<T, kCount> bits[kInFlight];
    Real weight[kInFlight];
    bool used[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int64_t row = first + i * kWarps;
      int64_t source = row;
      used[i] = row < end && column < n;
      weight[i] = 1;
      if (used[i] && task.gather.row_to_slot) {
        const int64_t slot = task.gather.row_to_slot[row];
        used[i] = slot >= 0 && slot < task.gather.num_slots;
        source = static_cast<uint32_t>(slot) / static_cast<uint32_t>(task.gather.top_k);
        if (used[i] && weights) weight[i] = weights[slot];
      }
      if (used[i]) bits[i] = load<kCount>(rows + source * n + column);
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (!used[i]) continue;
      Real x[kCount];
      bits[i].unpack(x);
#pragma unroll
      for (int j = 0; j < kCount; ++j) sum[j] += weight[i] * x[j];
    }
  }

  // Element j of every lane side by side: no bank conflicts.
#pragma unroll
  for (int j = 0; j < kCount; ++j) sums[(warp * kCount + j) * 32 + lane] = sum[j];
  if (!MOE_BUG(bgrad, 1)) __syncthreads();
  for (int i = threadIdx.x; i < 32 * kCount; i += blockDim.x) {
    Real total = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) total += sums[w * 32 * kCount + i];
    const int64_t target = (int64_t{blockIdx.y} * 32 + i % 32) * kCount + i / 32;
    if (target < n) partials[tile * n + target] = total;
  }
}

template <typename T>
__global__ void __launch_bounds__(Tiling::kThreads) bgrad_expert_kernel(const Wide<T>* partials, BgradTask task) {
  T* output = static_cast<T*>(task.output);
  for_tiles(task.num_experts, task.n, 1, [&](int64_t place, int64_t column) {
    Wide<T> sum = 0;
    const int64_t end = task.schedule.first_tile[place + 1];
#pragma unroll 4
    for (int64_t tile = task.schedule.first_tile[place]; tile < end; ++tile) sum += partials[tile * task.n + column];
    output[task.schedule.order[place] * task.n + column] = narrow<T>(sum);
  });
}

template <typename T, int kCount>
Status bgrad(const BgradTask& task, const CudaContext& cuda) {
  // A tile is full, or the last of its expert.
  const int64_t tiles = task.num_rows / task.schedule.tile_rows + task.num_experts;
  Wide<T>* partials = allocate<Wide<T>>(tiles * task.n, cuda);
  if (!partials) return Status::kOutOfMemory;
  const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(ceil_div(task.n, 32 * kCount)));
  LAUNCH((bgrad_tile_kernel<T, kCount>), grid, dim3(32 * kWarps), 0, stream(cuda), partials, task);
  const Status status = launched("bgrad_tile", cuda);
  if (status != Status::kOk) return status;
  const Tiling tiling(task.num_experts, task.n);
  LAUNCH(bgrad_expert_kernel<T>, tiling.grid, tiling.block, 0, stream(cuda), partials, task);
  return launched("bgrad_expert", cuda);
}

}  // namespace

Status bgrad(const BgradTask& task, const CudaContext& cuda) {
  if (task.num_experts == 0 || task.n == 0) return Status::kOk;
  return with_type(task.dtype, [&]<typename T>(std::type_identity<T>) {
    return with_piece<T>(fits_pieces(task.n * static_cast<int64_t>(sizeof(T)), task.rows),
                         [&](auto count) { return bgrad<T, count>(task, cuda); });
  });
}

}  // namespace moe::cuda

namespace moe {

Status grouped_gemm_bgrad_cuda(const GroupedGemmBgradArgs& args, const CudaContext& cuda) {
  constexpr int64_t kTileRows = 128;
  cuda::BgradTask task{.output = args.output,
                       .rows = args.grad_output,
                       .gather = {},
                       .row_weights = nullptr,
                       .schedule = {},
                       .num_rows = args.num_rows,
                       .num_experts = args.num_experts,
                       .n = args.n,
                       .dtype = args.dtype};
  const Status status =
      cuda::make_schedule(args.expert_offsets, args.num_rows, args.num_experts, kTileRows, cuda, &task.schedule);
  return status == Status::kOk ? cuda::bgrad(task, cuda) : status;
}

}  // namespace moe
