// route, by one of three kernels: many tokens per warp (route_lanes.cuh) where at most 16 of up to 512 experts are
// chosen; else, to 512 experts and 32 choices, a warp has a token; beyond that, and for fp64, a block has one,
// with sort keys in shared memory.
#include <algorithm>
#include <bit>

#include "route_lanes.cuh"

namespace moe::cuda {
namespace {

__global__ void clear_kernel(int32_t* flag) { *flag = 0; }

constexpr int kWarpsPerBlock = 8;

template <typename T, int kItems>
__global__ void __launch_bounds__(32 * kWarpsPerBlock, 4) route_warp_kernel(RouteTask<T> task) {
  const int64_t token = int64_t{blockIdx.x} * kWarpsPerBlock + threadIdx.x / 32;
  if (token < task.num_tokens) route_token(task, token, Items<kItems>{});
}

constexpr int kThreads = 256;

// fold(x, y) over the block, in a fixed order, the same in every thread. `parts`: a value per warp.
template <typename Real, typename Fold>
__device__ __forceinline__ Real block_reduce(Real x, Real* parts, const Fold& fold) {
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
  if (!MOE_BUG(route, 1)) __syncthreads();
  Real result = parts[0];
  for (int w = 1; w < kThreads / 32; ++w) result = fold(result, parts[w]);
  if (!MOE_BUG(route, 2)) __syncthreads();
  return result;
}

template <typename Real>
struct Candidate {
  Key<Real> key;
  uint32_t id;

  __device__ __forceinline__ void take(Key<Real> other_key, uint32_t other_id) {
    const bool better = other_key > key || (other_key == key && other_id < id);
    key = better ? other_key : key;
    id = better ? other_id : id;
  }
};

// Takes the best of keys[0 .. n) k times: sets its key to 0 and calls emit(j, id) in thread 0. Thread i has the keys i,
// i + kThreads, ..; only the warp of the last winner must look again.
template <typename Real, typename Emit>
__device__ __forceinline__ void select(Key<Real>* keys, int n, int k, Candidate<Real>* best_of_warp, const Emit& emit) {
  const int warp = threadIdx.x / 32;
  int winner = -1;  // every warp, at first
  for (int j = 0; j < k; ++j) {
    if (winner < 0 || winner % kThreads / 32 == warp) {
      Candidate<Real> best{0, ~0u};
      for (int i = threadIdx.x; i < n; i += kThreads) best.take(keys[i], i);
#pragma unroll
      for (int step = 16; step > 0; step /= 2) {
        const Key<Real> key = __shfl_xor_sync(~0u, best.key, step);
        const uint32_t id = __shfl_xor_sync(~0u, best.id, step);
        best.take(key, id);
      }
      if (threadIdx.x % 32 == 0) best_of_warp[warp] = best;
    }
    if (!MOE_BUG(route, 3)) __syncthreads();
    Candidate<Real> best = best_of_warp[0];
#pragma unroll
    for (int w = 1; w < kThreads / 32; ++w) best.take(best_of_warp[w].key, best_of_warp[w].id);
    winner = static_cast<int>(best.id);
    if (threadIdx.x == winner % kThreads && winner < n) keys[winner] = 0;
    if (threadIdx.x == 0) emit(j, winner);
    if (!MOE_BUG(route, 4)) __syncthreads();
  }
}

// Forbids, or sets to 0, the experts outside of the best groups. group_keys: [groups].
template <typename T>
__device__ __forceinline__ void drop_groups(const RouteTask<T>& task, Key<Wide<T>>* keys, Key<Wide<T>>* group_keys,
                                            Candidate<Wide<T>>* best_of_warp) {
  using Real = Wide<T>;
  const int num_groups = task.rule.num_groups, size = task.num_experts / num_groups, lane = threadIdx.x % 32;
  if (!MOE_BUG(route, 5)) __syncthreads();
  for (int g = threadIdx.x / 32; g < num_groups; g += kThreads / 32) {
    Top2<Real> best;
    for (int i = lane; i < size; i += 32) best.add(value_of<Real>(keys[g * size + i]));
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
      const Real first = __shfl_xor_sync(~0u, best.first, step), second = __shfl_xor_sync(~0u, best.second, step);
      best.merge(first, second);
    }
    if (lane == 0) group_keys[g] = key_of(best.score(task.rule.group_score, size));
  }
  if (!MOE_BUG(route, 6)) __syncthreads();
  select<Real>(group_keys, num_groups, task.rule.topk_groups, best_of_warp, [](int, int) {});
  // A group that was taken has no key any more.
  const Key<Real> dropped = task.rule.group_mask == GroupMask::kZero ? key_of(Real{0}) : 0;
  for (int e = threadIdx.x; e < task.num_experts; e += kThreads) {
    if (group_keys[e / size] != 0) keys[e] = dropped;
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 2) route_block_kernel(RouteTask<T> task) {
  using Real = Wide<T>;
  SMEM_DYN(Key<Real>, shared);
  SMEM_ARRAY(Real, parts, kThreads / 32);
  SMEM_ARRAY(Candidate<Real>, best_of_warp, kThreads / 32);
  Key<Real>* keys =
      task.scratch ? task.scratch + int64_t{blockIdx.x} * (task.num_experts + task.rule.num_groups) : shared;
  const auto for_experts = [&](const auto& fn) {
    for (int e = threadIdx.x; e < task.num_experts; e += kThreads) fn(e);
  };
  for (int64_t token = blockIdx.x; token < task.num_tokens; token += gridDim.x) {
    const T* logits = task.logits + token * task.num_experts;
    int32_t* ids = task.topk_ids + token * task.top_k;
    if (task.non_finite) {
      bool finite = true;
      for_experts([&](int e) { finite &= is_finite(widen(logits[e])); });
      task.check_finite(finite);
    }
    Softmax<Real> softmax;
    if (task.rule.over_all()) {
      Real largest = kNone<Real>, sum = 0;
      for_experts([&](int e) { largest = larger(largest, widen(logits[e])); });
      softmax.largest = block_reduce(warp_max(largest), parts, [](Real x, Real y) { return larger(x, y); });
      for_experts([&](int e) { sum += softmax.exponent(widen(logits[e])); });
      softmax.scale = 1 / block_reduce(warp_sum(sum), parts, [](Real x, Real y) { return x + y; });
    }
    if (task.route_override) {
      for (int j = threadIdx.x; j < task.top_k; j += kThreads) ids[j] = task.route_override[token * task.top_k + j];
      if (!MOE_BUG(route, 7)) __syncthreads();
    } else {
      for_experts([&](int e) {
        Real c = widen(logits[e]);
        if (task.by_score()) c = score(task.rule, softmax, c);
        if (task.bias) c += task.bias[e];
        keys[e] = key_of(c);
      });
      if (task.rule.num_groups > 1) drop_groups(task, keys, keys + task.num_experts, best_of_warp);
      select<Real>(keys, task.num_experts, task.top_k, best_of_warp, [ids](int j, int id) { ids[j] = id; });
    }
    if (threadIdx.x < 32) store_selection(task, token, [ids](int j) { return ids[j]; }, softmax);
  }
}

// A function that is not inlined takes the address of the task: it would be copied to local memory, and read from
// there.
template <typename T, typename Shape>
__global__ void __launch_bounds__(32 * kLaneWarps, Shape::kBlocks)
    route_lanes_kernel(const __grid_constant__ RouteTask<T> task) {
  const int64_t first = (int64_t{blockIdx.x} * kLaneWarps + threadIdx.x / 32) * (32 / Shape::kLanes);
  if (first < task.num_tokens) route_tokens<T, Shape>(task, first);
}

template <typename T, typename Shape>
Status launch_lanes(const RouteTask<T>& task, const CudaContext& cuda) {
  constexpr int64_t kTokens = kLaneWarps * 32 / Shape::kLanes;
  LAUNCH((route_lanes_kernel<T, Shape>), dim3(static_cast<unsigned>(ceil_div(task.num_tokens, kTokens))),
         dim3(32 * kLaneWarps), 0, stream(cuda), task);
  return launched("route", cuda);
}

template <typename T>
Status launch_lanes_of_shape(const RouteTask<T>& task, const CudaContext& cuda) {
  if (task.top_k > 8) return launch_lanes<T, LaneShape<8, 8, 8, 16, false>>(task, cuda);
  if (task.num_experts <= 64) return launch_lanes<T, LaneShape<8, 2, 4, 8, false>>(task, cuda);
  if (task.num_experts <= 128) {
    return task.by_logits() ? launch_lanes<T, LaneShape<4, 8, 4, 8, true>>(task, cuda)
                            : launch_lanes<T, LaneShape<4, 8, 4, 8, false>>(task, cuda);
  }
  return task.num_experts <= 256 ? launch_lanes<T, LaneShape<4, 8, 8, 8, false>>(task, cuda)
                                 : launch_lanes<T, LaneShape<8, 8, 8, 8, false>>(task, cuda);
}

template <typename T>
bool lanes_serve(const RouteTask<T>& task) {
  const int experts = task.num_experts, groups = task.rule.num_groups;
  const int unit = experts <= 128 ? 4 : 8;
  const bool aligned = reinterpret_cast<uintptr_t>(task.logits) % at_most(unit * sizeof(T), 16) == 0 &&
                       reinterpret_cast<uintptr_t>(task.bias) % 16 == 0;
  const bool groups_fit = groups == 1 || (groups == 8 && (experts == 128 || experts == 256 || experts == 512));
  // Lanes for 16 choices are those for 512 experts, and a unit of each of few experts would be all that they have.
  const bool choices_fit = task.top_k <= 8 || (task.top_k <= 16 && groups == 1 && experts > 128);
  return aligned && groups_fit && choices_fit && !task.route_override && experts % unit == 0 && experts <= 512;
}

template <typename T, int kItems>
Status launch_warps(RouteTask<T> task, const CudaContext& cuda) {
  constexpr int64_t kLaneBytes = at_most(kItems * sizeof(T), 16);
  task.whole_lanes = task.num_experts % kItems == 0 && reinterpret_cast<uintptr_t>(task.logits) % kLaneBytes == 0;
  LAUNCH((route_warp_kernel<T, kItems>), dim3(static_cast<unsigned>(ceil_div(task.num_tokens, kWarpsPerBlock))),
         dim3(32 * kWarpsPerBlock), 0, stream(cuda), task);
  return launched("route", cuda);
}

template <typename T>
Status launch_blocks(RouteTask<T> task, const CudaContext& cuda) {
  const int64_t count = int64_t{task.num_experts} + task.rule.num_groups;
  const int64_t bytes = count * static_cast<int64_t>(sizeof(Key<Wide<T>>));
  const bool in_shared = bytes <= kPlainSharedBytes;  // of which two blocks fit
  const int64_t blocks = at_most(task.num_tokens, in_shared ? 1 << 16 : 1 << 10);
  if (!in_shared) {
    task.scratch = allocate<Key<Wide<T>>>(blocks * count, cuda);
    if (!task.scratch) return Status::kOutOfMemory;
  }
  LAUNCH(route_block_kernel<T>, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), in_shared ? bytes : 0,
         stream(cuda), task);
  return launched("route", cuda);
}

}  // namespace
}  // namespace moe::cuda

namespace moe {

using namespace cuda;

Status route_cuda(const RouteArgs& args, const CudaContext& cuda) {
  if (args.options.check_finite) {
    LAUNCH(clear_kernel, dim3(1), dim3(1), 0, stream(cuda), args.non_finite);
    const Status status = launched("route_clear", cuda);
    if (status != Status::kOk) return status;
  }
  if (args.num_tokens == 0) return Status::kOk;
  return with_type(args.dtype, [&]<typename T>(std::type_identity<T>) {
    using Real = Wide<T>;
    const RouteTask<T> task{static_cast<Real*>(args.topk_weights),
                            args.topk_ids,
                            static_cast<const T*>(args.router_logits),
                            static_cast<const Real*>(args.expert_bias),
                            args.route_override,
                            args.options.check_finite ? args.non_finite : nullptr,
                            args.num_tokens,
                            static_cast<int>(args.num_experts),
                            static_cast<int>(args.top_k),
                            false,
                            nullptr,
                            RouteRule<Real>(args.options)};
    if constexpr (sizeof(T) <= 4) {
      if (lanes_serve(task)) return launch_lanes_of_shape(task, cuda);
      const int items = static_cast<int>(std::bit_ceil(static_cast<uint64_t>(ceil_div(args.num_experts, 32))));
      const bool groups_fit = args.route_override || args.options.num_groups == 1 ||
                              lanes_of_group(task.num_experts, task.rule.num_groups, items) > 0;
      if (args.top_k <= kMostChoices && groups_fit) {
        switch (items) {
          case 1:
            return launch_warps<T, 1>(task, cuda);
          case 2:
            return launch_warps<T, 2>(task, cuda);
          case 4:
            return launch_warps<T, 4>(task, cuda);
          case 8:
            return launch_warps<T, 8>(task, cuda);
          case 16:
            return launch_warps<T, 16>(task, cuda);
        }
      }
    }
    return launch_blocks<T>(task, cuda);
  });
}

}  // namespace moe
