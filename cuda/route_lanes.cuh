// route of several tokens by a warp, each in kLanes lanes, so that the steps of a reduction and of a selection are
// shared. For up to 16 choices of up to 512 experts, and eight groups of experts.
//
// Four or eight adjacent experts are a unit. The best experts are in as many units, those with the largest maxima:
// these are found first, and then the best of their experts. Both by sorting the keys of each lane and merging the
// lists of the lanes, with minima and maxima alone. A key has 32 bits: the upper bits of a value, and below them the
// complement of the expert's id, so that of equal values the lower id wins. A NaN has a place in that order, too:
// beyond infinity, on either side.
//
// Keys decide only what they can. What was chosen is held against all values, and a token for which the upper bits did
// not suffice, or with values that are not finite among the chosen, is routed again by the whole warp (route_warp.cuh).
#pragma once

#include "route_approx.cuh"
#include "route_sort.cuh"
#include "route_warp.cuh"

namespace moe::cuda {

constexpr int kLaneWarps = 4;

// A token has kLanes lanes, a lane kUnits units of kUnit experts each: unit v of a lane is unit v * kLanes + lane of
// the token. kBest: the most choices. kPlain: the choice is by logits alone, which leaves registers for more warps.
template <int kLanes_, int kUnits_, int kUnit_, int kBest_, bool kPlain_>
struct LaneShape {
  static constexpr int kLanes = kLanes_, kUnits = kUnits_, kUnit = kUnit_, kBest = kBest_;
  static constexpr bool kPlain = kPlain_;
  static constexpr int kExperts = kLanes * kUnits * kUnit;
  static constexpr int kGroupExperts = kLanes * kUnit;          // of group v of kUnits, which is unit v of all lanes
  static constexpr bool kDirect = kUnits * kUnit == kBest;      // a lane's list holds all of its experts
  static constexpr int kPer = kBest / kLanes;                   // choices of a lane, and units that it looks at again
  static constexpr int kBlocks = kPlain && kUnit == 4 ? 8 : 4;  // that share a multiprocessor
  static_assert(kBest % kLanes == 0 && (kDirect || kUnits % kLanes == 0), "lanes have as many choices, and groups");
  static_assert((kExperts & (kExperts - 1)) == 0, "an id is what a mask leaves of a key");
};

template <typename T, typename Shape>
class LaneRouter {
  static constexpr int kLanes = Shape::kLanes, kUnits = Shape::kUnits, kUnit = Shape::kUnit, kBest = Shape::kBest;
  static constexpr int kPer = Shape::kPer, kSeen = Shape::kDirect ? kUnits : kPer;
  static constexpr float kLeastLogit = -80;
  static constexpr uint32_t kLastUnit = kUnits * kLanes - 1, kLastId = Shape::kExperts - 1;

 public:
  // `token` is the lane's.
  __device__ __forceinline__ LaneRouter(const RouteTask<T>& task, int64_t token)
      : task_(task), logits_(task.logits + token * task.num_experts), lane_(threadIdx.x % kLanes) {}

  // Whether the lane's choices are known to be right, as far as this lane can tell.
  __device__ __forceinline__ bool choose() {
    float c[kUnits][kUnit], maxima[kUnits];
    load(c);
    if (task_.non_finite) {
      bool finite = true;
#pragma unroll
      for (int v = 0; v < kUnits; ++v) {
#pragma unroll
        for (int i = 0; i < kUnit; ++i) finite &= !exists(v * kLanes + lane_) || is_finite(c[v][i]);
      }
      task_.check_finite(finite);
    }
    find_maxima(c, maxima, [](float a, float b) { return fmaxf(a, b); });
    if (task_.rule.over_all()) {
      largest_ = maxima[0];
#pragma unroll
      for (int v = 1; v < kUnits; ++v) largest_ = fmaxf(largest_, maxima[v]);
      largest_ = max_lanes<kLanes>(largest_);
      float sum[kUnit] = {};
#pragma unroll
      for (int v = 0; v < kUnits; ++v) {
#pragma unroll
        for (int i = 0; i < kUnit; ++i) sum[i] += exponent(c[v][i]);  // 0 for what does not exist
      }
#pragma unroll
      for (int half = kUnit / 2; half > 0; half /= 2) {
#pragma unroll
        for (int i = 0; i < half; ++i) sum[i] += sum[i + half];
      }
      scale_ = 1 / sum_lanes<kLanes>(sum[0]);
      in_range_ = fabsf(largest_ * kLog2E) < INFINITY;
    }
    if (!by_logits()) {
      with_score([&](const auto& score_of) {
#pragma unroll
        for (int v = 0; v < kUnits; ++v) to_choice(score_of, v * kLanes + lane_, c[v]);
      });
      find_maxima(c, maxima, [](float a, float b) { return ptx::max_or_nan(a, b); });
    }
    if constexpr (!Shape::kDirect && !Shape::kPlain) {
      if (task_.rule.num_groups > 1) drop_groups(c, maxima);
    }
    uint32_t list[kBest];
    if constexpr (Shape::kDirect) {
      uint32_t keys[kUnits * kUnit];
#pragma unroll
      for (int v = 0; v < kUnits; ++v) {
        add_keys(keys, v, v * kLanes + lane_, c[v]);
#pragma unroll
        for (int i = 0; i < kUnit; ++i) seen_[v][i] = c[v][i];
      }
      best_of_lanes<kLanes>(keys, list);
    } else {
      best_of_units(maxima, list);
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
  __device__ __forceinline__ bool by_logits() const { return Shape::kPlain || task_.by_logits(); }
  __device__ __forceinline__ int place(int i) const { return lane_ * kPer + i; }
  __device__ __forceinline__ bool has(int i) const { return place(i) < task_.top_k; }
  __device__ __forceinline__ bool exists(int unit) const { return unit < task_.num_experts / kUnit; }
  __device__ __forceinline__ float exponent(float z) const {
    // The rounding of the second product is the same for all, and so no part of a quotient of exponentials.
    return ptx::exp2_approx(__fmaf_rn(z, kLog2E, -(largest_ * kLog2E)));
  }

  // All that the lane has. Where all exist, addresses are one and constants.
  __device__ __forceinline__ void load(float (&z)[kUnits][kUnit]) const {
    if (task_.num_experts == Shape::kExperts) {
      const T* mine = logits_ + kUnit * lane_;
#pragma unroll
      for (int v = 0; v < kUnits; ++v) widen_unit(mine + v * kLanes * kUnit, z[v]);
    } else {
#pragma unroll
      for (int v = 0; v < kUnits; ++v) load_unit(v * kLanes + lane_, z[v]);
    }
  }
  static __device__ __forceinline__ void widen_unit(const T* p, float (&z)[kUnit]) {
    using Word = std::conditional_t<kUnit * sizeof(T) == 8, uint2, uint4>;
    constexpr int kWords = kUnit * sizeof(T) / sizeof(Word);
    Word words[kWords];
    T parts[kUnit];
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = __ldg(reinterpret_cast<const Word*>(p) + i);
    memcpy(parts, words, sizeof(parts));
#pragma unroll
    for (int i = 0; i < kUnit; ++i) z[i] = widen(parts[i]);
  }
  // -infinity for a unit that does not exist.
  __device__ __forceinline__ void load_unit(int unit, float (&z)[kUnit]) const {
    if (exists(unit)) return widen_unit(logits_ + unit * kUnit, z);
#pragma unroll
    for (int i = 0; i < kUnit; ++i) z[i] = kNone<float>;
  }

  // Calls fn(score_of), which makes of a logit what is chosen by, but for the bias. Around loops, so that they do not
  // ask for each expert which score it is.
  template <typename Fn>
  __device__ __forceinline__ void with_score(const Fn& fn) const {
    if (!task_.by_score()) return fn([](float z) { return z; });
    switch (task_.rule.score_function) {
      case ScoreFunction::kSoftmax:
        return fn([&](float z) { return __fmul_rn(exponent(z), scale_); });
      case ScoreFunction::kSigmoid:
        return fn([](float z) { return sigmoid_approx(z); });
      case ScoreFunction::kSqrtSoftplus:
        return fn([](float z) { return sqrt_softplus_approx(z); });
    }
  }
  __device__ __forceinline__ float with_bias(float score, float bias) const {
    return task_.bias ? __fadd_rn(score, bias) : score;
  }
  template <typename ScoreOf>
  __device__ __forceinline__ void to_choice(const ScoreOf& score_of, int unit, float (&z)[kUnit]) const {
    if (!exists(unit)) return;
#pragma unroll
    for (int i = 0; i < kUnit; i += 4) {
      float4 bias = {};
      if (task_.bias) bias = __ldg(reinterpret_cast<const float4*>(task_.bias + unit * kUnit + i));
      const float of_quad[] = {bias.x, bias.y, bias.z, bias.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) z[i + j] = with_bias(score_of(z[i + j]), of_quad[j]);
    }
  }

  // A group is unit v of all lanes.
  __device__ __forceinline__ bool is_dropped(int group) const { return (dropped_ >> group & 1) != 0; }
  __device__ __forceinline__ float dropped_choice() const {
    return task_.rule.group_mask == GroupMask::kZero ? 0.0f : kNone<float>;
  }

  // Takes the choices of all but the best groups away.
  __device__ __forceinline__ void drop_groups(const float (&c)[kUnits][kUnit], float (&maxima)[kUnits]) {
    constexpr int kOwn = kUnits / kLanes;  // groups whose score a lane computes: lane * kOwn + i
    float first[kUnits], second[kUnits];
#pragma unroll
    for (int v = 0; v < kUnits; ++v) {
      first[v] = maxima[v], second[v] = second_of_unit(c[v]);
      in_range_ &= first[v] < INFINITY || MOE_BUG(route, 14);  // with others, and NaN, there is no order of sums
    }
    // In each step a lane keeps one half of the groups and gives the other away.
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) {
      const bool upper = (lane_ & step) != 0;
      const int half = kOwn * step;
#pragma unroll
      for (int v = 0; v < half; ++v) {
        const float other_first = __shfl_xor_sync(~0u, upper ? first[v] : first[v + half], step);
        const float other_second = __shfl_xor_sync(~0u, upper ? second[v] : second[v + half], step);
        const float mine = upper ? first[v + half] : first[v], runner_up = upper ? second[v + half] : second[v];
        second[v] = fmaxf(MOE_BUG(route, 15) ? mine : fminf(mine, other_first), fmaxf(runner_up, other_second));
        first[v] = fmaxf(mine, other_first);
      }
    }
    float score[kOwn];
    int ahead[kOwn] = {};
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      score[i] = task_.rule.group_score == GroupScore::kMax ? first[i] : __fadd_rn(first[i], second[i]);
    }
#pragma unroll
    for (int away = 0; away < kLanes; ++away) {
#pragma unroll
      for (int j = 0; j < kOwn; ++j) {
        const float other = __shfl_xor_sync(~0u, score[j], away);
        const int group = (lane_ ^ away) * kOwn + j;
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
          const bool lower = group < lane_ * kOwn + i && !MOE_BUG(route, 16);
          ahead[i] += other > score[i] || (other == score[i] && lower) ? 1 : 0;
        }
      }
    }
    dropped_ = 0;
    const int first_lane = static_cast<int>(threadIdx.x) % 32 - lane_;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const uint32_t lanes = __ballot_sync(~0u, ahead[i] >= task_.rule.topk_groups) >> first_lane;
#pragma unroll
      for (int lane = 0; lane < kLanes; ++lane) dropped_ |= (lanes >> lane & 1) << (lane * kOwn + i);
    }
#pragma unroll
    for (int v = 0; v < kUnits; ++v) maxima[v] = is_dropped(v) ? dropped_choice() : maxima[v];
  }

  template <typename Max>
  static __device__ __forceinline__ void find_maxima(const float (&c)[kUnits][kUnit], float (&maxima)[kUnits],
                                                     const Max& max) {
#pragma unroll
    for (int v = 0; v < kUnits; ++v) maxima[v] = unit_maximum(c[v], max);
  }

  template <int n>
  __device__ __forceinline__ void add_keys(uint32_t (&keys)[n], int at, int unit, const float (&c)[kUnit]) const {
#pragma unroll
    for (int i = 0; i < kUnit; ++i) {
      keys[at * kUnit + i] = (in_order(c[i]) & ~kLastId) | (kLastId - static_cast<uint32_t>(unit * kUnit + i));
    }
  }

  // The keys of the best in the best units: each lane looks again at kPer of those.
  __device__ __forceinline__ void best_of_units(const float (&maxima)[kUnits], uint32_t (&list)[kBest]) {
    uint32_t units[kUnits], best[kBest], keys[kPer * kUnit];
#pragma unroll
    for (int v = 0; v < kUnits; ++v) {
      units[v] = (in_order(maxima[v]) & ~kLastUnit) | (kLastUnit - static_cast<uint32_t>(v * kLanes + lane_));
    }
    best_of_lanes<kLanes>(units, best);
    int unit[kPer];
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      unit[i] = static_cast<int>(kLastUnit - (pick(best, i) & kLastUnit));
      load_unit(unit[i], seen_[i]);
    }
    if (!by_logits()) {
      with_score([&](const auto& score_of) {
#pragma unroll
        for (int i = 0; i < kPer; ++i) to_choice(score_of, unit[i], seen_[i]);
      });
    }
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      const bool dropped = is_dropped(unit[i] / kLanes);
#pragma unroll
      for (int j = 0; j < kUnit; ++j) seen_[i][j] = dropped ? dropped_choice() : seen_[i][j];
      add_keys(keys, i, unit[i], seen_[i]);
    }
    best_of_lanes<kLanes>(keys, list);
  }

  // list[place(i)].
  static __device__ __forceinline__ uint32_t pick(const uint32_t (&list)[kBest], int i) {
    const int lane = threadIdx.x % kLanes;
    uint32_t key = 0;
#pragma unroll
    for (int l = 0; l < kLanes; ++l) key = lane == l ? list[l * kPer + i] : key;
    return key;
  }

  __device__ __forceinline__ bool decide(const uint32_t (&list)[kBest], const float (&maxima)[kUnits]) {
    bool right = in_range_;
    float c[kPer];
    bool valid[kPer];
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      id_[i] = static_cast<int32_t>(kLastId - (pick(list, i) & kLastId));
      valid[i] = has(i) && id_[i] < task_.num_experts;
      z_[i] = valid[i] ? widen(logits_[id_[i]]) : kNone<float>;
      c[i] = z_[i];
    }
    if (!by_logits()) {
      with_score([&](const auto& score_of) {
#pragma unroll
        for (int i = 0; i < kPer; ++i) {
          if (valid[i]) c[i] = with_bias(score_of(z_[i]), task_.bias ? task_.bias[id_[i]] : 0.0f);
        }
      });
    }
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      if (is_dropped(id_[i] / Shape::kGroupExperts)) c[i] = dropped_choice();
      // The approximate exponential has no small numbers; no score below 1e-17 decides here.
      if (valid[i] && task_.by_score()) right &= task_.rule.is_softmax() || z_[i] > kLeastLogit;
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
    // 3. No other is as good: none of those that were sorted, and no unit that was not looked at again. Of 16 bits a
    // key has all, so it cannot have erred.
    if ((sizeof(T) == 2 && by_logits()) || MOE_BUG(route, 11)) return right;
    const float wrong = MOE_BUG(route, 12) ? 0 : 1024;  // more than the sorted can be
    float count = 0;
#pragma unroll
    for (int v = 0; v < kSeen; ++v) {
      bool any = false;
#pragma unroll
      for (int i = 0; i < kUnit; ++i) {
        any |= seen_[v][i] >= least;
        count += seen_[v][i] >= least ? 1.0f : 0.0f;
      }
      if constexpr (!Shape::kDirect) count -= any ? wrong : 0.0f;
    }
    if constexpr (!Shape::kDirect) {
#pragma unroll
      for (int v = 0; v < kUnits; ++v) count += maxima[v] >= least ? wrong : 0.0f;
    }
    const float of_all = sum_lanes<kLanes>(count);
    return right && of_all == static_cast<float>(task_.top_k);
  }

  const RouteTask<T>& task_;
  const T* logits_;
  int lane_;
  uint32_t dropped_ = 0;           // groups, as bits
  float largest_ = 0, scale_ = 0;  // of the softmax
  bool in_range_ = true;           // of what the approximations are good for
  float seen_[kSeen][kUnit];       // what the last sort was over
  float z_[kPer], weight_[kPer];
  int32_t id_[kPer];
};

// One token, again; rare, so its code is short.
template <typename T>
__device__ __attribute__((noinline)) void route_again(const RouteTask<T>& task, int64_t token) {
  int items = 1;
  while (32 * items < task.num_experts) items *= 2;
  route_token(task, token, Items<16, false>{items});
}

// The tokens from `first` on, 32 / kLanes of them. By one warp.
template <typename T, typename Shape>
__device__ __forceinline__ void route_tokens(const RouteTask<T>& task, int64_t first) {
  constexpr int kLanes = Shape::kLanes;
  constexpr uint32_t kOneToken = (1u << kLanes) - 1;
  const int mine = static_cast<int>(threadIdx.x % 32) / kLanes;
  const bool active = first + mine < task.num_tokens;
  const int64_t token = active ? first + mine : first;
  LaneRouter<T, Shape> router(task, token);
  uint32_t open = __ballot_sync(~0u, !router.choose() && active);
  router.weigh();
  if (active && (open >> mine * kLanes & kOneToken) == 0) router.store(token);
  while (open != 0 && !MOE_BUG(route, 13)) {
    const int next = (__ffs(static_cast<int>(open)) - 1) / kLanes;
    route_again(task, first + next);
    open &= ~(kOneToken << next * kLanes);
  }
}

}  // namespace moe::cuda
