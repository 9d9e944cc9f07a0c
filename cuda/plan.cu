// plan: a stable counting sort in two launches, or in one when the slots fit a block.
//
// Slots are cut into chunks, a block each, and a chunk into one run of slots per warp. Launch 1 counts the slots of
// each expert in each chunk. In launch 2 every block adds up the counts of the chunks before its own, which gives its
// first rank of each expert, and those of all chunks, which gives the offsets; counts again per warp; and then every
// warp places its slots in order. Atomics only ever count, so no order depends on them. A chunk has at least kDensity
// slots per expert, so that the counters cost no more than the slots do.
#include "plan.cuh"

#include <algorithm>

#include "launch.cuh"

namespace moe::cuda {
namespace {

constexpr int kMostWarps = 32;
constexpr int64_t kDensity = 4, kMostBlocks = 256, kLeastSlotsPerWarp = 64;
constexpr int kInFlight = 4;  // ids that a thread loads ahead

struct PlanTask {
  PlanArgs args;
  int64_t num_slots, num_rows, slots_per_warp, capacity;
  int32_t* counts;   // [blocks, E], or null with one block
  int32_t* scratch;  // [blocks, warps + 2, E] where shared memory does not hold them, or null
};

// -1 for a slot that belongs to no expert or lies past the end.
__device__ __forceinline__ int32_t expert_of(const PlanTask& task, int64_t slot, int64_t end) {
  const int32_t e = slot < end ? task.args.topk_ids[slot] : -1;
  return e >= 0 && e < task.args.num_experts ? e : -1;
}

__global__ void __launch_bounds__(32 * kMostWarps) plan_count_kernel(PlanTask task, bool in_shared) {
  SMEM_DYN(int32_t, shared);
  const int num_experts = static_cast<int>(task.args.num_experts);
  int32_t* counts = task.counts + int64_t{blockIdx.x} * num_experts;
  int32_t* sums = in_shared ? shared : counts;
  for (int e = threadIdx.x; e < num_experts; e += blockDim.x) sums[e] = 0;
  if (!MOE_BUG(plan, 1)) __syncthreads();
  const int64_t chunk = task.slots_per_warp * (blockDim.x / 32), begin = blockIdx.x * chunk;
  const int64_t end = at_most(begin + chunk, task.num_slots);
#pragma unroll kInFlight
  for (int64_t slot = begin + threadIdx.x; slot < end; slot += blockDim.x) {
    const int32_t e = expert_of(task, slot, end);
    if (e >= 0) atomicAdd(&sums[e], 1);
  }
  if (!in_shared) return;
  if (!MOE_BUG(plan, 2)) __syncthreads();
  for (int e = threadIdx.x; e < num_experts; e += blockDim.x) counts[e] = sums[e];
}

// totals[e] becomes the sum of min(totals[i], capacity) over i < e. Returns the sum over all.
__device__ __forceinline__ int32_t scan_offsets(int32_t* totals, int num_experts, int64_t capacity) {
  SMEM_ARRAY(int32_t, warp_sums, kMostWarps);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, num_warps = blockDim.x / 32;
  int32_t sum = 0;
  for (int first = 0; first < num_experts; first += blockDim.x) {
    const int e = first + threadIdx.x;
    const int32_t kept = e < num_experts ? static_cast<int32_t>(at_most(totals[e], capacity)) : 0;
    int32_t inclusive = kept;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int32_t before = __shfl_up_sync(~0u, inclusive, step);
      if (lane >= step) inclusive += before;
    }
    if (lane == 31) warp_sums[warp] = inclusive;
    if (!MOE_BUG(plan, 3)) __syncthreads();
    int32_t all = 0;
    for (int w = 0; w < num_warps; ++w) {
      if (w == warp) inclusive += all;
      all += warp_sums[w];
    }
    if (e < num_experts) totals[e] = sum + inclusive - kept;
    sum += all;
    if (!MOE_BUG(plan, 4)) __syncthreads();
  }
  return sum;
}

__global__ void __launch_bounds__(32 * kMostWarps, 1) plan_place_kernel(PlanTask task) {
  SMEM_DYN(int32_t, shared);
  const PlanArgs& args = task.args;
  const int num_experts = static_cast<int>(args.num_experts), lane = threadIdx.x % 32, num_warps = blockDim.x / 32;
  // First, next rank of each warp: `ranks`; of the block: `before`; rows of each expert, then its offset: `offsets`.
  int32_t* ranks = task.scratch ? task.scratch + int64_t{blockIdx.x} * (num_warps + 2) * num_experts : shared;
  int32_t* before = ranks + num_warps * num_experts;
  int32_t* offsets = before + num_experts;
  int32_t* my_ranks = ranks + static_cast<int>(threadIdx.x / 32) * num_experts;
  for (int i = threadIdx.x; i < (num_warps + 2) * num_experts; i += blockDim.x) ranks[i] = 0;
  if (!MOE_BUG(plan, 5)) __syncthreads();

  // 1. Count the slots of each expert in each warp's run.
  const int64_t begin = (int64_t{blockIdx.x} * num_warps + threadIdx.x / 32) * task.slots_per_warp;
  const int64_t end = at_most(begin + task.slots_per_warp, task.num_slots);
#pragma unroll kInFlight
  for (int64_t slot = begin + lane; slot < end; slot += 32) {
    const int32_t e = expert_of(task, slot, end);
    if (e >= 0) atomicAdd(&my_ranks[e], 1);
  }

  // 2. Add up the chunks; the experts of one chunk are next to each other, and idle threads share the chunks.
  if (task.counts) {
    const int parts = static_cast<int>(blockDim.x) >= num_experts ? static_cast<int>(blockDim.x) / num_experts : 1;
    const int num_blocks = static_cast<int>(gridDim.x);
    for (int i = threadIdx.x; i < parts * num_experts; i += blockDim.x) {
      const int e = i % num_experts, part = i / num_experts;
      int32_t total = 0, mine = 0;
#pragma unroll 8
      for (int b = part; b < num_blocks; b += parts) {
        const int32_t count = task.counts[int64_t{b} * num_experts + e];
        total += count;
        mine += b < static_cast<int>(blockIdx.x) ? count : 0;
      }
      atomicAdd(&offsets[e], total);
      atomicAdd(&before[e], mine);
    }
  }
  if (!MOE_BUG(plan, 6)) __syncthreads();

  // 3. Counts of a warp become its first ranks, the totals become offsets.
  for (int e = threadIdx.x; e < num_experts; e += blockDim.x) {
    int32_t rank = before[e];
    for (int w = 0; w < num_warps; ++w) {
      const int32_t count = ranks[w * num_experts + e];
      ranks[w * num_experts + e] = rank;
      rank += count;
    }
    if (!task.counts) offsets[e] = rank;
  }
  // The scan reads the totals with the thread that wrote them, and ends with a barrier.
  const int32_t kept_rows = scan_offsets(offsets, num_experts, task.capacity);

  // 4. Place each slot; lanes of one expert rank by lane.
#pragma unroll 1
  for (int64_t first = begin; first < end; first += 32 * kInFlight) {
    int32_t expert[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) expert[i] = expert_of(task, first + 32 * i + lane, end);
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int64_t slot = first + 32 * i + lane;
      const int32_t e = expert[i];
      const uint32_t peers = __match_any_sync(~0u, e);
      const int earlier = __popc(peers & ((1u << lane) - 1));
      const int32_t rank = e >= 0 ? my_ranks[e] + earlier : 0;
      if (!MOE_BUG(plan, 7)) __syncwarp();
      if (e >= 0 && earlier == 0) my_ranks[e] = rank + __popc(peers);
      if (!MOE_BUG(plan, 8)) __syncwarp();
      const bool kept = e >= 0 && rank < task.capacity;
      const int32_t row = kept ? offsets[e] + rank : -1;
      if (slot < end) args.slot_to_row[slot] = row;
      if (kept && (row < task.num_rows || MOE_BUG(ep, 7))) args.row_to_slot[row] = static_cast<int32_t>(slot);
    }
  }

  // 5. What is left: the rows without a slot, and the offsets.
  const int64_t stride = int64_t{gridDim.x} * blockDim.x;
  for (int64_t row = kept_rows + int64_t{blockIdx.x} * blockDim.x + threadIdx.x; row < task.num_rows; row += stride) {
    args.row_to_slot[row] = -1;
  }
  if (blockIdx.x != 0) return;
  for (int e = threadIdx.x; e < num_experts; e += blockDim.x) args.expert_offsets[e] = offsets[e];
  if (threadIdx.x == 0) args.expert_offsets[num_experts] = kept_rows;
}

}  // namespace

Status plan_rows(const PlanArgs& args, int64_t num_rows, const CudaContext& cuda) {
  const int64_t num_slots = args.num_tokens * args.top_k, num_experts = args.num_experts;
  const int64_t expert_bytes = num_experts * static_cast<int64_t>(sizeof(int32_t));
  const int64_t fit = kMostSharedBytes / std::max<int64_t>(expert_bytes, 1) - 2;
  const bool in_shared = fit >= 1;
  const int64_t warps = in_shared ? std::min<int64_t>(fit, kMostWarps) : kMostWarps / 4;
  const int64_t least =
      std::max({kLeastSlotsPerWarp, ceil_div(kDensity * num_experts, warps), ceil_div(num_slots, kMostBlocks * warps)});
  const int64_t slots_per_warp = ceil_div(least, 32) * 32;
  const int64_t blocks = std::max<int64_t>(ceil_div(num_slots, slots_per_warp * warps), 1);

  PlanTask task{args,    num_slots, num_rows, slots_per_warp, args.capacity < 0 ? num_slots : args.capacity,
                nullptr, nullptr};
  if (blocks > 1) {
    task.counts = allocate<int32_t>(blocks * num_experts, cuda);
    if (!task.counts) return Status::kOutOfMemory;
  }
  if (!in_shared) {
    task.scratch = allocate<int32_t>(blocks * (warps + 2) * num_experts, cuda);
    if (!task.scratch) return Status::kOutOfMemory;
  }
  const dim3 grid(static_cast<unsigned>(blocks)), block(static_cast<unsigned>(32 * warps));
  Status status = Status::kOk;
  if (task.counts) {
    const int64_t shared_bytes = in_shared ? expert_bytes : 0;
    LAUNCH(plan_count_kernel, grid, block, shared_bytes, stream(cuda), task, in_shared);
    status = launched("plan_count", cuda);
  }
  const int64_t shared_bytes = in_shared ? (warps + 2) * expert_bytes : 0;
  if (status == Status::kOk && shared_bytes > kPlainSharedBytes) {
    status = allow_shared_memory(plan_place_kernel, kMostSharedBytes, "plan_place", cuda);
  }
  if (status != Status::kOk) return status;
  LAUNCH(plan_place_kernel, grid, block, shared_bytes, stream(cuda), task);
  return launched("plan_place", cuda);
}

}  // namespace moe::cuda

namespace moe {

Status plan_cuda(const PlanArgs& args, const CudaContext& cuda) {
  return cuda::plan_rows(args, args.num_tokens * args.top_k, cuda);
}

}  // namespace moe
