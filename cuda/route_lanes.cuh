// route of several tokens by a warp, each in kLanes lanes, so that the steps of a reduction and of a selection are
// shared. For up to 8 choices of up to 512 experts, without groups.
//
// Four adjacent experts are a quad. The 8 best experts are in the 8 quads with the largest maxima: those are found
// first, and then the best of their 32 experts. Both by sorting 8 keys in each lane and merging the lists of the lanes,
// with minima and maxima alone. A key has 32 bits: the upper bits of a value, and below them the complement of the
// expert's id, so that of equal values the lower id wins.
// A NaN has a place in that order, too: beyond infinity, on either side.
//
// Keys decide only what they can. What was chosen is held against all values, and a token for which the upper bits did
// not suffice, or with values that are not finite among the chosen, is routed again by the whole warp (route_warp.cuh).
#pragma once

#include "route_warp.cuh"

namespace moe::cuda {

constexpr int kBest = 8, kQuad = 4, kLaneWarps = 4, kNoQuad = 1 << 20;

// What route_token has per lane for as many experts.
template <int kQuads, int kLanes>
constexpr int kWarpItems = kQuad * kQuads * kLanes > 32 ? kQuad * kQuads * kLanes / 32 : 1;

// fold(x, y) over a token's lanes, the same in each of them.
template <int kLanes, typename Fold>
__device__ __forceinline__ float fold_lanes(float x, const Fold& fold) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) x = fold(x, __shfl_xor_sync(~0u, x, step));
  return x;
}
template <int kLanes>
__device__ __forceinline__ float sum_lanes(float x) {
  return fold_lanes<kLanes>(x, [](float a, float b) { return a + b; });
}
template <int kLanes>
__device__ __forceinline__ float max_lanes(float x) {
  return fold_lanes<kLanes>(x, [](float a, float b) { return fmaxf(a, b); });
}

// The larger first.
__device__ __forceinline__ void order(uint32_t& a, uint32_t& b) {
  const uint32_t larger = a > b ? a : b;
  b = a > b ? b : a;
  a = larger;
}

// The first n of a list, descending, by Batcher's network.
template <int n>
__device__ __forceinline__ void sort(uint32_t (&list)[kBest]) {
  constexpr int kPairs[19][2] = {{0, 1}, {2, 3}, {0, 2}, {1, 3}, {1, 2}, {4, 5}, {6, 7}, {4, 6}, {5, 7}, {5, 6},
                                 {0, 4}, {1, 5}, {2, 6}, {3, 7}, {2, 4}, {3, 5}, {1, 2}, {3, 4}, {5, 6}};
#pragma unroll
  for (int i = 0; i < (n == 4 ? 5 : 19); ++i) order(list[kPairs[i][0]], list[kPairs[i][1]]);
}

// The best 8 of this lane's list and of that of the lane `step` away. Of either, only the first n are more than 0.
template <int n>
__device__ __forceinline__ void merge(uint32_t (&list)[kBest], int step) {
  uint32_t other[kBest] = {};
#pragma unroll
  for (int i = 0; i < n; ++i) other[i] = __shfl_xor_sync(~0u, list[i], step);
#pragma unroll
  for (int i = 0; i < kBest; ++i) {
    const uint32_t last = other[kBest - 1 - i];
    if (i >= n)
      list[i] = last;
    else if (kBest - 1 - i < n)
      list[i] = list[i] > last ? list[i] : last;
  }
  // First ascending, then descending, or the reverse: three steps sort that.
#pragma unroll
  for (int half = kBest / 2; half > 0; half /= 2) {
#pragma unroll
    for (int i = 0; i < kBest; ++i) {
      if ((i & half) == 0) order(list[i], list[i + half]);
    }
  }
}
template <int n, int kLanes>
__device__ __forceinline__ void sort_lanes(uint32_t (&list)[kBest]) {
  sort<n>(list);
  if constexpr (kLanes > 1) merge<n>(list, 1);
#pragma unroll
  for (int step = 2; step < kLanes; step *= 2) merge<kBest>(list, step);
}

// kPlain: the choice is by logits alone, which leaves registers for more warps.
template <typename T, int kQuads, int kLanes, bool kPlain>
class LaneRouter {
  static constexpr int kPer = kLanes < kBest ? kBest / kLanes : 1;  // choices of a lane, and quads it looks at again
  static constexpr bool kDirect = kQuads * kQuad == kBest;          // a lane's list holds all of its experts
  static constexpr int kSeen = kDirect ? kQuads : kPer;
  static constexpr int kTakers = kLanes < kBest ? kLanes : kBest;  // lanes that have choices
  static constexpr float kLog2E = 1.44269504088896340736f;
  static constexpr uint32_t kLastQuad = kQuads * kLanes - 1, kLastId = kQuad * kQuads * kLanes - 1;

 public:
  // `token` is the lane's.
  __device__ __forceinline__ LaneRouter(const RouteTask<T>& task, int64_t token)
      : task_(task), logits_(task.logits + token * task.num_experts), lane_(threadIdx.x % kLanes) {}

  // Whether the lane's choices are known to be right, as far as this lane can tell.
  __device__ __forceinline__ bool choose() {
    float c[kQuads][kQuad], maxima[kQuads];
    load(c);
    if (task_.non_finite) {
      bool finite = true;
#pragma unroll
      for (int v = 0; v < kQuads; ++v) {
#pragma unroll
        for (int i = 0; i < kQuad; ++i) finite &= !exists(v * kLanes + lane_) || is_finite(c[v][i]);
      }
      task_.check_finite(finite);
    }
    find_maxima(c, maxima);
    if (task_.rule.over_all()) {
      largest_ = maxima[0];
#pragma unroll
      for (int v = 1; v < kQuads; ++v) largest_ = fmaxf(largest_, maxima[v]);
      largest_ = max_lanes<kLanes>(largest_);
      float sum[kQuad] = {};
#pragma unroll
      for (int v = 0; v < kQuads; ++v) {
#pragma unroll
        for (int i = 0; i < kQuad; ++i) sum[i] += exponent(c[v][i]);  // 0 for what does not exist
      }
      scale_ = 1 / sum_lanes<kLanes>((sum[0] + sum[1]) + (sum[2] + sum[3]));
      in_range_ = fabsf(largest_ * kLog2E) < INFINITY;
    }
    if (!by_logits()) {
#pragma unroll
      for (int v = 0; v < kQuads; ++v) to_choice(v * kLanes + lane_, c[v]);
      find_maxima(c, maxima);
    }
    uint32_t list[kBest] = {};
    if constexpr (kDirect) {
#pragma unroll
      for (int v = 0; v < kQuads; ++v) {
        add_keys(list, v, v * kLanes + lane_, c[v]);
#pragma unroll
        for (int i = 0; i < kQuad; ++i) seen_[v][i] = c[v][i];
      }
      sort_lanes<kBest, kLanes>(list);
    } else {
      best_of_quads(maxima, list);
    }
    return decide(list, maxima);
  }

  // By lanes that all have chosen.
  __device__ __forceinline__ void weigh() {
    const auto& rule = task_.rule;
    if (rule.is_softmax() && !rule.over_all()) {
      float largest = kNone<float>, sum = 0;
#pragma unroll
      for (int i = 0; i < kPer; ++i) largest = has(i) ? fmaxf(largest, z_[i]) : largest;
      largest_ = max_lanes<kLanes>(largest);
#pragma unroll
      for (int i = 0; i < kPer; ++i) sum += has(i) ? exponent(z_[i]) : 0;
      scale_ = 1 / sum_lanes<kLanes>(sum);
    }
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      weight_[i] = rule.is_softmax() ? exponent(z_[i]) * scale_ : score(rule, Softmax<float>{}, z_[i]);
      if (rule.renormalize && has(i)) sum += rule.power(weight_[i]);
    }
    const float divisor = rule.renormalize ? rule.norm(sum_lanes<kLanes>(sum)).divisor : 1;
#pragma unroll
    for (int i = 0; i < kPer; ++i) weight_[i] = weight_[i] / divisor * rule.scale;
  }

  __device__ __forceinline__ void store(int64_t token) const {
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      if (!has(i)) continue;
      task_.topk_ids[token * task_.top_k + place(i)] = id_[i];
      task_.topk_weights[token * task_.top_k + place(i)] = weight_[i];
    }
  }

 private:
  __device__ __forceinline__ bool by_logits() const { return kPlain || (!task_.by_score() && !task_.bias); }
  __device__ __forceinline__ int place(int i) const { return lane_ * kPer + i; }
  __device__ __forceinline__ bool has(int i) const { return place(i) < task_.top_k; }
  __device__ __forceinline__ bool exists(int quad) const { return quad < task_.num_experts / kQuad; }
  __device__ __forceinline__ float exponent(float z) const {
    // The rounding of the second product is the same for all, and so no part of a quotient of exponentials.
    return ptx::exp2_approx(__fmaf_rn(z, kLog2E, -(largest_ * kLog2E)));
  }

  // All that the lane has. Where all exist, addresses are one and constants.
  __device__ __forceinline__ void load(float (&z)[kQuads][kQuad]) const {
    if (task_.num_experts == kQuad * kQuads * kLanes) {
      const T* mine = logits_ + kQuad * lane_;
#pragma unroll
      for (int v = 0; v < kQuads; ++v) widen_quad(mine + v * kLanes * kQuad, z[v]);
    } else {
#pragma unroll
      for (int v = 0; v < kQuads; ++v) load_quad(v * kLanes + lane_, z[v]);
    }
  }
  static __device__ __forceinline__ void widen_quad(const T* p, float (&z)[kQuad]) {
    using Word = std::conditional_t<sizeof(T) == 4, uint4, uint2>;
    const Word word = __ldg(reinterpret_cast<const Word*>(p));
    T parts[kQuad];
    memcpy(parts, &word, sizeof(parts));
#pragma unroll
    for (int i = 0; i < kQuad; ++i) z[i] = widen(parts[i]);
  }
  // -infinity for a quad that does not exist.
  __device__ __forceinline__ void load_quad(int quad, float (&z)[kQuad]) const {
    if (exists(quad)) return widen_quad(logits_ + quad * kQuad, z);
#pragma unroll
    for (int i = 0; i < kQuad; ++i) z[i] = kNone<float>;
  }

  // What is chosen by, from a logit. Written so that no compiler rounds it differently in two places.
  __device__ __forceinline__ float choice(float z, float bias) const {
    if (task_.by_score()) z = task_.rule.is_softmax() ? __fmul_rn(exponent(z), scale_) : sigmoid<float>(z);
    return task_.bias ? __fadd_rn(z, bias) : z;
  }
  __device__ __forceinline__ void to_choice(int quad, float (&z)[kQuad]) const {
    if (!exists(quad)) return;
    float4 bias = {};
    if (task_.bias) bias = __ldg(reinterpret_cast<const float4*>(task_.bias) + quad);
    z[0] = choice(z[0], bias.x), z[1] = choice(z[1], bias.y);
    z[2] = choice(z[2], bias.z), z[3] = choice(z[3], bias.w);
  }

  static __device__ __forceinline__ float quad_maximum(const float (&c)[kQuad]) {
    return fmaxf(fmaxf(c[0], c[1]), fmaxf(c[2], c[3]));
  }
  __device__ __forceinline__ void find_maxima(const float (&c)[kQuads][kQuad], float (&maxima)[kQuads]) const {
#pragma unroll
    for (int v = 0; v < kQuads; ++v) maxima[v] = quad_maximum(c[v]);
  }

  __device__ __forceinline__ void add_keys(uint32_t (&list)[kBest], int at, int quad, const float (&c)[kQuad]) const {
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      list[at * kQuad + i] = (in_order(c[i]) & ~kLastId) | (kLastId - static_cast<uint32_t>(quad * kQuad + i));
    }
  }

  // The keys of the best 8 in the 8 best quads: each lane looks again at kPer of those.
  __device__ __forceinline__ void best_of_quads(const float (&maxima)[kQuads], uint32_t (&list)[kBest]) {
    uint32_t quads[kBest];
#pragma unroll
    for (int v = 0; v < kQuads; ++v) {
      quads[v] = (in_order(maxima[v]) & ~kLastQuad) | (kLastQuad - static_cast<uint32_t>(v * kLanes + lane_));
    }
    sort_lanes<kBest, kLanes>(quads);
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      const auto quad = static_cast<int>(kLastQuad - (pick(quads, i) & kLastQuad));
      const bool mine = kLanes <= kBest || lane_ < kTakers;
      load_quad(mine ? quad : kNoQuad, seen_[i]);
      if (!by_logits()) to_choice(mine ? quad : kNoQuad, seen_[i]);
      if (mine) add_keys(list, i, quad, seen_[i]);
    }
    sort_lanes<kPer * kQuad, kTakers>(list);
  }

  // list[place(i)], or 0.
  static __device__ __forceinline__ uint32_t pick(const uint32_t (&list)[kBest], int i) {
    const int lane = threadIdx.x % kLanes;
    uint32_t key = 0;
#pragma unroll
    for (int l = 0; l < kTakers; ++l) key = lane == l ? list[l * kPer + i] : key;
    return key;
  }

  __device__ __forceinline__ bool decide(const uint32_t (&list)[kBest], const float (&maxima)[kQuads]) {
    bool right = in_range_;
    float c[kPer];
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      id_[i] = static_cast<int32_t>(kLastId - (pick(list, i) & kLastId));
      const bool valid = has(i) && id_[i] < task_.num_experts;
      z_[i] = valid ? widen(logits_[id_[i]]) : kNone<float>;
      c[i] = z_[i];
      if (valid && !by_logits()) c[i] = choice(z_[i], task_.bias ? task_.bias[id_[i]] : 0.0f);
    }
    // 1. In order.
    const float next_c = __shfl_down_sync(~0u, c[0], 1, kLanes);
    const int32_t next_id = __shfl_down_sync(~0u, id_[0], 1, kLanes);
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      const float other = i + 1 < kPer ? c[i + 1 < kPer ? i + 1 : i] : next_c;
      const int32_t other_id = i + 1 < kPer ? id_[i + 1 < kPer ? i + 1 : i] : next_id;
      const bool ordered = c[i] > other || (c[i] == other && id_[i] < other_id);
      if (place(i) + 1 < task_.top_k && !MOE_BUG(route, 9)) right &= ordered;
    }
    // 2. The least of the chosen is a number.
    float least = c[0];
#pragma unroll
    for (int i = 1; i < kPer; ++i) least = (task_.top_k - 1) % kPer == i ? c[i] : least;
    least = __shfl_sync(~0u, least, (task_.top_k - 1) / kPer, kLanes);
    if (!MOE_BUG(route, 10)) right &= least > kNone<float>;
    // 3. No other is as good: none of those that were sorted, and no quad that was not looked at again. Of 16 bits a
    // key has all, so it cannot have erred.
    if ((sizeof(T) == 2 && by_logits()) || MOE_BUG(route, 11)) return right;
    const float wrong = MOE_BUG(route, 12) ? 0 : 1024;  // more than the sorted can be
    float count = 0;
#pragma unroll
    for (int v = 0; v < kSeen; ++v) {
#pragma unroll
      for (int i = 0; i < kQuad; ++i) count += seen_[v][i] >= least ? 1.0f : 0.0f;
      if constexpr (!kDirect) count -= quad_maximum(seen_[v]) >= least ? wrong : 0.0f;
    }
    if constexpr (!kDirect) {
#pragma unroll
      for (int v = 0; v < kQuads; ++v) count += maxima[v] >= least ? wrong : 0.0f;
    }
    const float of_all = sum_lanes<kLanes>(count);
    return right && of_all == static_cast<float>(task_.top_k);
  }

  const RouteTask<T>& task_;
  const T* logits_;
  int lane_;
  float largest_ = 0, scale_ = 0;  // of the softmax
  bool in_range_ = true;           // of its exponents
  float seen_[kSeen][kQuad];       // what the last sort was over
  float z_[kPer], weight_[kPer];
  int32_t id_[kPer];
};

// The tokens from `first` on, 32 / kLanes of them. By one warp.
template <typename T, int kQuads, int kLanes, bool kPlain>
__device__ __forceinline__ void route_tokens(const RouteTask<T>& task, int64_t first) {
  constexpr uint32_t kOneToken = (1u << kLanes) - 1;
  const int mine = static_cast<int>(threadIdx.x % 32) / kLanes;
  const bool active = first + mine < task.num_tokens;
  const int64_t token = active ? first + mine : first;
  LaneRouter<T, kQuads, kLanes, kPlain> router(task, token);
  uint32_t open = __ballot_sync(~0u, !router.choose() && active);
  router.weigh();
  if (active && (open >> mine * kLanes & kOneToken) == 0) router.store(token);
  while (open != 0 && !MOE_BUG(route, 13)) {
    const int next = (__ffs(static_cast<int>(open)) - 1) / kLanes;
    route_token<T, kWarpItems<kQuads, kLanes>>(task, first + next);
    open &= ~(kOneToken << next * kLanes);
  }
}

}  // namespace moe::cuda
