// route of one token by a warp, with its logits in registers: up to 512 experts and 32 choices. And what the other ways
// share with it: the task, sort keys, and how a selection is stored.
//
// A sort key orders like the value it is made of, and is never 0: 0 marks what may not be chosen (any more). Of equal
// keys the lower id wins.
#pragma once

#include "route.cuh"

namespace moe::cuda {

template <typename Real>
using Key = std::conditional_t<sizeof(Real) == 8, uint64_t, uint32_t>;

// Unsigned integers that are in the order of the values; -0 counts as 0.
template <typename Real>
__device__ __forceinline__ Key<Real> in_order(Real value) {
  using Signed = std::make_signed_t<Key<Real>>;
  constexpr int kSignBit = 8 * sizeof(Real) - 1;
  value = value + Real{0};
  Key<Real> bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits ^ (static_cast<Key<Real>>(static_cast<Signed>(bits) >> kSignBit) | Key<Real>{1} << kSignBit);
}
template <typename Real>
__device__ __forceinline__ Key<Real> key_of(Real value) {
  return in_order(value == value ? value : kNone<Real>);  // NaN counts as -infinity
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
  __host__ __device__ __forceinline__ bool by_score() const {
    return rule.scores_first && (bias || rule.num_groups > 1);
  }
  // The choice is by logits as they are.
  __host__ __device__ __forceinline__ bool by_logits() const { return !bias && rule.num_groups == 1; }
  __device__ __forceinline__ void check_finite(bool finite) const {
    if (non_finite && !finite) atomicMax(non_finite, 1);
  }
};

template <typename Real>
__device__ __forceinline__ bool is_finite(Real z) {
  return fabs(z) < -kNone<Real>;
}

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

constexpr int kMostChoices = 32;

// The values that a lane has: as many as an array holds, in registers; or `count` of them in local memory, by loops
// that are not unrolled, where the code has to be short rather than fast.
template <int kItems_, bool kInRegisters_ = true>
struct Items {
  static constexpr int kItems = kItems_;
  static constexpr bool kInRegisters = kInRegisters_;
  int some = kItems;

  __device__ __forceinline__ int count() const { return kInRegisters ? kItems : some; }
  template <typename Fn>
  __device__ __forceinline__ void for_each(const Fn& fn) const {
#pragma unroll(kInRegisters ? kItems : 1)
    for (int i = 0; i < count(); ++i) fn(i);
  }
};

// The logits of experts lane * items + i; -infinity past the last.
template <typename T, typename Some, int kItems>
__device__ __forceinline__ void load_logits(const RouteTask<T>& task, int64_t token, int lane, Some items,
                                            float (&z)[kItems]) {
  constexpr int kBytes = kItems * static_cast<int>(sizeof(T));
  using Word =
      std::conditional_t<kBytes >= 16, uint4,
                         std::conditional_t<kBytes == 8, uint2, std::conditional_t<kBytes == 4, uint32_t, uint16_t>>>;
  constexpr int kWords = kBytes / static_cast<int>(sizeof(Word));
  const T* logits = task.logits + token * task.num_experts;
  const int first = lane * items.count();
  if (Some::kInRegisters && task.whole_lanes) {
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
  items.for_each([&](int i) { z[i] = first + i < task.num_experts ? widen(logits[first + i]) : kNone<float>; });
}

// Lanes that share a group, or 0 when a group's experts are not the whole of 1, 2, 4, .. lanes.
__host__ __device__ inline int lanes_of_group(int num_experts, int num_groups, int items) {
  const int size = num_experts / num_groups, lanes = size / items;
  return size % items == 0 && (lanes & (lanes - 1)) == 0 ? lanes : 0;
}

template <typename T, typename Some, int kItems>
__device__ __forceinline__ void drop_groups(const RouteTask<T>& task, int lane, Some items, const float (&c)[kItems],
                                            uint32_t (&keys)[kItems]) {
  const int num_groups = task.rule.num_groups;
  const int lanes = lanes_of_group(task.num_experts, num_groups, items.count()), group = lane / lanes;
  Top2<float> best;
  items.for_each([&](int i) { best.add(c[i]); });
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
  items.for_each([&](int i) { keys[i] = task.rule.group_mask == GroupMask::kZero ? key_of(0.0f) : 0; });
}

// The lane's choice, for lane < top_k. Expert ids ascend with the lanes and within a lane, so the first of equal keys
// has the lowest id, and a key needs no id in it.
template <typename Some, int kItems>
__device__ __forceinline__ int32_t choose(Some items, uint32_t (&keys)[kItems], int top_k, int lane) {
  uint32_t best = 0;
  items.for_each([&](int i) { best = keys[i] > best ? keys[i] : best; });
  int32_t mine = -1;
  for (int j = 0; j < top_k; ++j) {
    const uint32_t largest = __reduce_max_sync(~0u, best);
    const int winner = __ffs(__ballot_sync(~0u, best == largest)) - 1;
    int32_t id = 0;
    if (lane == winner) {
      bool found = false;
      best = 0;
      items.for_each([&](int i) {
        const bool is_first = !found && keys[i] == largest;
        found |= is_first;
        id = is_first ? lane * items.count() + i : id;
        keys[i] = is_first ? 0 : keys[i];
        best = keys[i] > best ? keys[i] : best;
      });
    }
    id = __shfl_sync(~0u, id, winner);
    if (lane == j) mine = id;
  }
  return mine;
}

template <typename T, typename Some>
__device__ __forceinline__ void route_token(const RouteTask<T>& task, int64_t token, Some items) {
  const int lane = threadIdx.x % 32, first = lane * items.count();
  float z[Some::kItems];
  load_logits(task, token, lane, items, z);
  if (task.non_finite) {
    bool finite = true;
    items.for_each([&](int i) { finite &= first + i >= task.num_experts || is_finite(z[i]); });
    task.check_finite(finite);
  }

  // 1. What scores of all experts need.
  Softmax<float> softmax;
  if (task.rule.over_all()) {
    float largest = kNone<float>, sum = 0;
    items.for_each([&](int i) { largest = larger(largest, z[i]); });
    softmax.largest = warp_max(largest);
    // NOTE: padding must not be added: exp(-infinity - -infinity) is NaN in a row of -infinity anyway, but one expert
    // at +infinity leaves NaN to itself.
    items.for_each([&](int i) { sum += first + i < task.num_experts ? softmax.exponent(z[i]) : 0; });
    softmax.scale = 1 / warp_sum(sum);
  }

  // 2. The best.
  int32_t mine = -1;
  if (task.route_override) {
    if (lane < task.top_k) mine = task.route_override[token * task.top_k + lane];
  } else {
    uint32_t keys[Some::kItems];
    items.for_each([&](int i) {
      const int e = first + i;
      if (task.by_score()) z[i] = score(task.rule, softmax, z[i]);
      if (task.bias && e < task.num_experts) z[i] += task.bias[e];
      z[i] = z[i] == z[i] ? z[i] : kNone<float>;
      keys[i] = e < task.num_experts ? key_of(z[i]) : 0;
    });
    if (task.rule.num_groups > 1) drop_groups(task, lane, items, z, keys);
    mine = choose(items, keys, task.top_k, lane);
  }
  if (lane < task.top_k) task.topk_ids[token * task.top_k + lane] = mine;

  // 3. Their weights.
  store_selection(task, token, [mine](int) { return mine; }, softmax);
}

}  // namespace moe::cuda
