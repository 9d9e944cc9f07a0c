// ep_plan: a slot is a (token, rank) pair whose bucket is a (chunk, rank) pair, and plan sorts the slots by bucket.
//
// What is left to do is to find the buckets. A block has a run of tokens: it writes where each choice is computed, and
// then asks of each of its slots whether a choice of the token is computed on that rank, so everything has one writer.
// Atomics only ever count.
#include "moe/ep_plan.h"

#include <algorithm>

#include "launch.cuh"
#include "plan.cuh"

namespace moe::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kSlotsPerBlock = 512, kMostTokens = 256;
constexpr int64_t kDensity = 8;  // counters per slot at most that a block clears and adds up in shared memory

struct BucketTask {
  EpPlanArgs args;
  int32_t* buckets;  // [T, W], -1: the token does not go there
  int64_t tokens_per_block;
  int64_t num_counters;  // in shared memory; 0: counted in args.counts
};

// Where a choice is computed, or -1.
__device__ __forceinline__ int32_t physical_id(const EpPlanArgs& args, int64_t slot) {
  const int32_t id = args.topk_ids[slot];
  if (id < 0 || id >= args.num_experts) return -1;
  int32_t physical = id;
  if (args.placement) {
    const int32_t* replicas = args.placement + id * args.num_replicas;
    int64_t count = 0;
    while (count < args.num_replicas && replicas[count] >= 0) ++count;
    if (count == 0) return -1;
    physical = replicas[(slot / args.top_k + args.ep_rank) % count];
  }
  return physical < args.ep_size * args.num_local_experts ? physical : -1;
}

// The inverse of "chunk c is the tokens [T * c / C, T * (c + 1) / C)", whatever is rounded.
__device__ __forceinline__ int64_t chunk_of(const EpPlanArgs& args, int64_t token) {
  int64_t chunk = token * args.num_chunks / args.num_tokens;
  while (chunk + 1 < args.num_chunks && token >= args.num_tokens * (chunk + 1) / args.num_chunks) ++chunk;
  return chunk;
}

__global__ void __launch_bounds__(kThreads) ep_plan_kernel(BucketTask task) {
  SMEM_DYN(int32_t, shared);
  SMEM_ARRAY(int32_t, chunks, kMostTokens);
  const EpPlanArgs& args = task.args;
  const int64_t begin = blockIdx.x * task.tokens_per_block;
  const int64_t end = at_most(begin + task.tokens_per_block, args.num_tokens);
  const int64_t ranks = args.ep_size, local = args.num_local_experts, num_chunks = args.num_chunks;
  const int64_t width = 2 * num_chunks + local;
  int32_t* counts = task.num_counters ? shared : args.counts;
  for (int64_t i = threadIdx.x; i < task.num_counters; i += kThreads) counts[i] = 0;
  for (int64_t i = threadIdx.x; i < end - begin; i += kThreads) {
    chunks[i] = static_cast<int32_t>(chunk_of(args, begin + i));
  }
  if (!MOE_BUG(ep, 1)) __syncthreads();

  for (int64_t slot = begin * args.top_k + threadIdx.x; slot < end * args.top_k; slot += kThreads) {
    const int32_t physical = physical_id(args, slot);
    args.physical_ids[slot] = physical;
    if (physical < 0) continue;
    const int64_t rank = physical / local;
    atomicAdd(&counts[rank * width + num_chunks + chunks[slot / args.top_k - begin]], 1);
    atomicAdd(&counts[rank * width + 2 * num_chunks + (physical - rank * local)], 1);
  }
  if (!MOE_BUG(ep, 2)) __syncthreads();

  for (int64_t slot = begin * ranks + threadIdx.x; slot < end * ranks; slot += kThreads) {
    const int64_t token = slot / ranks, rank = slot - token * ranks;
    bool goes = false;
    for (int64_t k = 0; k < args.top_k; ++k) {
      const int64_t expert = args.physical_ids[token * args.top_k + k] - rank * local;
      goes |= expert >= 0 && expert < local;
    }
    const int64_t chunk = chunks[token - begin];
    task.buckets[slot] = goes ? static_cast<int32_t>(chunk * ranks + rank) : -1;
    if (goes) atomicAdd(&counts[rank * width + chunk], 1);
  }
  if (task.num_counters == 0) return;
  if (!MOE_BUG(ep, 3)) __syncthreads();
  for (int64_t i = threadIdx.x; i < task.num_counters; i += kThreads) {
    if (counts[i] != 0) atomicAdd(&args.counts[i], counts[i]);
  }
}

}  // namespace
}  // namespace moe::cuda

namespace moe {

using namespace cuda;

Status ep_plan_cuda(const EpPlanArgs& args, const CudaContext& cuda) {
  const int64_t tokens = args.num_tokens, ranks = args.ep_size;
  const int64_t num_counters = ranks * (2 * args.num_chunks + args.num_local_experts);
  Status status =
      check(cudaMemsetAsync(args.counts, 0, num_counters * sizeof(int32_t), stream(cuda)), "ep_plan's counts", cuda);
  if (status != Status::kOk) return status;
  BucketTask task{args, allocate<int32_t>(tokens * ranks, cuda), 0, 0};
  if (!task.buckets) return Status::kOutOfMemory;
  const int64_t slots_per_token = std::max<int64_t>({args.top_k, ranks, 1});
  task.tokens_per_block = std::clamp<int64_t>(kSlotsPerBlock / slots_per_token, 1, kMostTokens);
  const bool in_shared = num_counters <= kDensity * task.tokens_per_block * slots_per_token &&
                         num_counters * static_cast<int64_t>(sizeof(int32_t)) <= kPlainSharedBytes / 2;
  task.num_counters = in_shared ? num_counters : 0;
  if (tokens > 0) {
    const dim3 grid(static_cast<unsigned>(ceil_div(tokens, task.tokens_per_block)));
    LAUNCH(ep_plan_kernel, grid, dim3(kThreads), task.num_counters * static_cast<int64_t>(sizeof(int32_t)),
           stream(cuda), task);
    status = launched("ep_plan", cuda);
    if (status != Status::kOk) return status;
  }
  return plan_rows({.expert_offsets = args.rank_offsets,
                    .row_to_slot = args.row_to_slot,
                    .slot_to_row = args.slot_to_row,
                    .topk_ids = task.buckets,
                    .num_tokens = tokens,
                    .num_experts = args.num_chunks * ranks,
                    .top_k = ranks,
                    .capacity = -1},
                   tokens * std::min(args.top_k, ranks), cuda);
}

}  // namespace moe
