// route. Up to 512 experts and 32 choices a warp has a token, with its logits in registers; beyond that, and for fp64,
// a block has one, with sort keys in shared memory. Both take the best expert top_k times.
//
// A sort key orders like the value it is made of, and is never 0: 0 marks what may not be chosen (any more). Of equal
// keys the lower id wins.
#include "route.cuh"

#include <algorithm>
#include <bit>

namespace moe::cuda {
namespace {

template <typename Real>
using Key = std::conditional_t<sizeof(Real) == 8, uint64_t, uint32_t>;

template <typename Real>
__device__ __forceinline__ Key<Real> key_of(Real value) {
  constexpr Key<Real> kSign = Key<Real>{1} << (8 * sizeof(Real) - 1);
  value = value == value ? value + Real{0} : kNone<Real>;  // NaN counts as -infinity, and -0 + 0 is 0
  Key<Real> bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits & kSign ? ~bits : bits | kSign;
}
template <typename Real>
__device__ __forceinline__ Real value_of(Key<Real> key) {
  constexpr Key<Real> kSign = Key<Real>{1} << (8 * sizeof(Real) - 1);
  const Key<Real> bits = key & kSign ? key & ~kSign : ~key;
  Real value;
  memcpy(&value, &bits, sizeof(bits));
  return value;
}

template <typename T>
struct RouteTask {
  using Real = Wide<T>;
  Real* topk_weights;
  int32_t* topk_ids;
  const T* logits;
  const Real* bias;
  const int32_t* route_override;
  int32_t* non_finite;  // null: not checked
  int64_t num_tokens;
  int num_experts, top_k;
  bool whole_lanes;    // a lane's logits are aligned, and all or none of them exist
  Key<Real>* scratch;  // [blocks, E + groups] where shared memory does not hold them, or null
  RouteRule<Real> rule;

  // The choice is by scores, else by logits.
  __device__ __forceinline__ bool by_score() const { return rule.scores_first && (bias || rule.num_groups > 1); }
  __device__ __forceinline__ void check_finite(bool finite) const {
    if (non_finite && !finite) atomicMax(non_finite, 1);
  }
};

template <typename Real>
__device__ __forceinline__ bool is_finite(Real z) {
  return fabs(z) < -kNone<Real>;
}

__global__ void clear_kernel(int32_t* flag) { *flag = 0; }

// The two largest of what was added.
template <typename Real>
struct Top2 {
  Real first = kNone<Real>, second = kNone<Real>;

  __device__ __forceinline__ void add(Real x) { merge(x, kNone<Real>); }
  __device__ __forceinline__ void merge(Real other, Real runner_up) {
    second = other > first ? larger(first, runner_up) : larger(second, other);
    first = larger(first, other);
  }
  // Of a group; infinity - infinity is no score.
  __device__ __forceinline__ Real score(GroupScore kind, int size) const {
    if (kind == GroupScore::kMax || size == 1) return first;
    const Real sum = first + second;
    return sum == sum ? sum : kNone<Real>;
  }
};

// Stores the choices and their weights. By one warp.
template <typename T, typename Ids>
__device__ __forceinline__ void store_selection(const RouteTask<T>& task, int64_t token, const Ids& ids,
                                                Softmax<Wide<T>> softmax) {
  const T* logits = task.logits + token * task.num_experts;
  const Selection<T, Ids> selection(task.rule, logits, task.num_experts, task.top_k, ids, softmax);
  const auto divisor = selection.norm().divisor;
  selection.for_each([&](int j) {
    task.topk_weights[token * task.top_k + j] =
        selection.valid(j) ? selection.weight(j) / divisor * task.rule.scale : Wide<T>{0};
  });
}

constexpr int kWarpsPerBlock = 8, kMostChoices = 32;

// The logits of experts lane * kItems + i; -infinity past the last.
template <int kItems, typename T>
__device__ __forceinline__ void load_logits(const RouteTask<T>& task, int64_t token, int lane, float (&z)[kItems]) {
  constexpr int kBytes = kItems * static_cast<int>(sizeof(T));
  using Word =
      std::conditional_t<kBytes >= 16, uint4,
                         std::conditional_t<kBytes == 8, uint2, std::conditional_t<kBytes == 4, uint32_t, uint16_t>>>;
  constexpr int kWords = kBytes / static_cast<int>(sizeof(Word));
  const T* logits = task.logits + token * task.num_experts;
  const int first = lane * kItems;
  if (task.whole_lanes) {
    if (first < task.num_experts) {
      Word words[kWords];
      T parts[kItems];
#pragma unroll
      for (int i = 0; i < kWords; ++i) words[i] = __ldg(reinterpret_cast<const Word*>(logits + first) + i);
      memcpy(parts, words, sizeof(parts));
#pragma unroll
      for (int i = 0; i < kItems; ++i) z[i] = widen(parts[i]);
    } else {
#pragma unroll
      for (int i = 0; i < kItems; ++i) z[i] = kNone<float>;
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kItems; ++i) z[i] = first + i < task.num_experts ? widen(logits[first + i]) : kNone<float>;
}

// Lanes that share a group, or 0 when a group's experts are not the whole of 1, 2, 4, .. lanes.
__host__ __device__ inline int lanes_of_group(int num_experts, int num_groups, int items) {
  const int size = num_experts / num_groups, lanes = size / items;
  return size % items == 0 && (lanes & (lanes - 1)) == 0 ? lanes : 0;
}

template <typename T, int kItems>
__device__ __forceinline__ void drop_groups(const RouteTask<T>& task, int lane, const float (&c)[kItems],
                                            uint32_t (&keys)[kItems]) {
  const int num_groups = task.rule.num_groups;
  const int lanes = lanes_of_group(task.num_experts, num_groups, kItems), group = lane / lanes;
  Top2<float> best;
#pragma unroll
  for (int i = 0; i < kItems; ++i) best.add(c[i]);
  for (int step = 1; step < lanes; step *= 2) {
    const float first = __shfl_xor_sync(~0u, best.first, step), second = __shfl_xor_sync(~0u, best.second, step);
    best.merge(first, second);
  }
  const float mine = best.score(task.rule.group_score, task.num_experts / num_groups);
  int ahead = 0;  // groups that are better
  for (int g = 0; g < num_groups; ++g) {
    const float other = __shfl_sync(~0u, mine, g * lanes);
    ahead += other > mine || (other == mine && g < group);
  }
  if (ahead < task.rule.topk_groups || group >= num_groups) return;
#pragma unroll
  for (int i = 0; i < kItems; ++i) keys[i] = task.rule.group_mask == GroupMask::kZero ? key_of(0.0f) : 0;
}

// The lane's choice, for lane < top_k. Expert ids ascend with the lanes and within a lane, so the first of equal keys
// has the lowest id, and a key needs no id in it.
template <int kItems>
__device__ __forceinline__ int32_t choose(uint32_t (&keys)[kItems], int top_k, int lane) {
  uint32_t best = 0;
#pragma unroll
  for (int i = 0; i < kItems; ++i) best = keys[i] > best ? keys[i] : best;
  int32_t mine = -1;
  for (int j = 0; j < top_k; ++j) {
    const uint32_t largest = __reduce_max_sync(~0u, best);
    const int winner = __ffs(__ballot_sync(~0u, best == largest)) - 1;
    int32_t id = 0;
    if (lane == winner) {
      bool found = false;
      best = 0;
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        if (!found && keys[i] == largest) {
          found = true;
          id = lane * kItems + i;
          keys[i] = 0;
        }
        best = keys[i] > best ? keys[i] : best;
      }
    }
    id = __shfl_sync(~0u, id, winner);
    if (lane == j) mine = id;
  }
  return mine;
}

template <typename T, int kItems>
__global__ void __launch_bounds__(32 * kWarpsPerBlock) route_warp_kernel(RouteTask<T> task) {
  const int lane = threadIdx.x % 32;
  const int64_t token = int64_t{blockIdx.x} * kWarpsPerBlock + threadIdx.x / 32;
  if (token >= task.num_tokens) return;
  float z[kItems];
  load_logits(task, token, lane, z);
  if (task.non_finite) {
    bool finite = true;
#pragma unroll
    for (int i = 0; i < kItems; ++i) finite &= lane * kItems + i >= task.num_experts || is_finite(z[i]);
    task.check_finite(finite);
  }

  // 1. What scores of all experts need.
  Softmax<float> softmax;
  if (task.rule.over_all()) {
    float largest = kNone<float>, sum = 0;
#pragma unroll
    for (int i = 0; i < kItems; ++i) largest = larger(largest, z[i]);
    softmax.largest = warp_max(largest);
    // NOTE: padding must not be added: exp(-infinity - -infinity) is NaN in a row of -infinity anyway, but one expert
    // at +infinity leaves NaN to itself.
#pragma unroll
    for (int i = 0; i < kItems; ++i) sum += lane * kItems + i < task.num_experts ? softmax.exponent(z[i]) : 0;
    softmax.scale = 1 / warp_sum(sum);
  }

  // 2. The best.
  int32_t mine = -1;
  if (task.route_override) {
    if (lane < task.top_k) mine = task.route_override[token * task.top_k + lane];
  } else {
    uint32_t keys[kItems];
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int e = lane * kItems + i;
      if (task.by_score()) z[i] = score(task.rule, softmax, z[i]);
      if (task.bias && e < task.num_experts) z[i] += task.bias[e];
      z[i] = z[i] == z[i] ? z[i] : kNone<float>;
      keys[i] = e < task.num_experts ? key_of(z[i]) : 0;
    }
    if (task.rule.num_groups > 1) drop_groups(task, lane, z, keys);
    mine = choose(keys, task.top_k, lane);
  }
  if (lane < task.top_k) task.topk_ids[token * task.top_k + lane] = mine;

  // 3. Their weights.
  store_selection(task, token, [mine](int) { return mine; }, softmax);
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

template <typename T, int kItems>
Status launch_warps(RouteTask<T> task, const CudaContext& cuda) {
  constexpr int64_t kLaneBytes = kItems * sizeof(T) < 16 ? kItems * sizeof(T) : 16;
  task.whole_lanes = task.num_experts % kItems == 0 && reinterpret_cast<uintptr_t>(task.logits) % kLaneBytes == 0;
  LAUNCH((route_warp_kernel<T, kItems>), dim3(static_cast<unsigned>(ceil_div(task.num_tokens, kWarpsPerBlock))),
         dim3(32 * kWarpsPerBlock), 0, stream(cuda), task);
  return launched("route", cuda);
}

template <typename T>
Status launch_blocks(RouteTask<T> task, const CudaContext& cuda) {
  const int64_t count = int64_t{task.num_experts} + task.rule.num_groups;
  const int64_t bytes = count * static_cast<int64_t>(sizeof(Key<Wide<T>>));
  const bool in_shared = bytes <= kMostSharedBytes / 2;  // so that two blocks fit
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
