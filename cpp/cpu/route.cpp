#include "moe/route.h"

#include <atomic>
#include <cmath>

#include "convert.h"
#include "exp.h"
#include "parallel.h"
#include "reduce.h"
#include "topk.h"

namespace moe {
namespace {

// Logits that are worth a thread.
constexpr int64_t kLogitGrain = 1 << 13;

template <typename W>
void softmax(const W* __restrict z, int64_t n, W* __restrict v) {
  const W largest = reduce_max(z, n);
  for (int64_t i = 0; i < n; ++i) v[i] = exp_nonpositive(z[i] - largest);
  const W sum = reduce_sum<W>(n, [v](int64_t i) { return v[i]; });
  for (int64_t i = 0; i < n; ++i) v[i] /= sum;
}

template <typename W>
void score(ScoreFunction function, const W* __restrict z, int64_t n, W* __restrict v) {
  if (function == ScoreFunction::kSoftmax) return softmax(z, n, v);
  for (int64_t i = 0; i < n; ++i) v[i] = sigmoid(z[i]);
}

// One thread's scratch memory.
template <typename W>
struct Workspace {
  W *logits, *scores, *choice, *group_scores;    // [E] each
  int32_t *candidates, *order, *groups, *picks;  // [E] each

  static constexpr int64_t kArrays = 4;
  static Workspace of_chunk(int64_t chunk, int64_t num_experts, W* wide, int32_t* ints) {
    W* w = wide + chunk * kArrays * num_experts;
    int32_t* i = ints + chunk * kArrays * num_experts;
    const int64_t n = num_experts;
    return {w, w + n, w + 2 * n, w + 3 * n, i, i + n, i + 2 * n, i + 3 * n};
  }
};

// Keeps the experts of the best groups: moves their `choice` to the front and writes their ids, ascending, to
// `candidates`. Returns how many there are.
template <typename W>
int64_t keep_best_groups(const RouteOptions& options, int64_t num_experts, const Workspace<W>& work) {
  constexpr W kNone = -std::numeric_limits<W>::infinity();
  const int64_t size = num_experts / options.num_groups;
  for (int64_t g = 0; g < options.num_groups; ++g) {
    W first = kNone, second = kNone;
    for (int64_t e = g * size; e < (g + 1) * size; ++e) {
      const W c = work.choice[e];
      second = c > first ? first : c > second ? c : second;
      first = c > first ? c : first;
    }
    const W sum = size > 1 ? first + second : first;
    work.group_scores[g] = std::isnan(sum) ? kNone : sum;  // infinity - infinity
  }
  select_top_k(work.group_scores, options.num_groups, options.topk_groups, work.groups, work.order);
  std::sort(work.groups, work.groups + options.topk_groups);
  int64_t kept = 0;
  for (int64_t i = 0; i < options.topk_groups; ++i) {
    const int64_t begin = work.groups[i] * size;
    for (int64_t e = begin; e < begin + size; ++e, ++kept) {
      work.choice[kept] = work.choice[e];
      work.candidates[kept] = static_cast<int32_t>(e);
    }
  }
  return kept;
}

// Returns false when a logit is not finite.
template <typename T>
bool route_token(const RouteArgs& args, int64_t token, const Workspace<Wide<T>>& work) {
  using W = Wide<T>;
  const RouteOptions& options = args.options;
  const int64_t num_experts = args.num_experts, top_k = args.top_k;
  const T* __restrict logits = static_cast<const T*>(args.router_logits) + token * num_experts;
  const W* __restrict bias = static_cast<const W*>(args.expert_bias);
  W* __restrict weights = static_cast<W*>(args.topk_weights) + token * top_k;
  int32_t* __restrict ids = args.topk_ids + token * top_k;
  W* z = work.logits;
  W* choice = work.choice;

  for (int64_t e = 0; e < num_experts; ++e) z[e] = widen(logits[e]);
  int infinite = 0;
  for (int64_t e = 0; e < num_experts; ++e) infinite |= !(std::abs(z[e]) <= std::numeric_limits<W>::max());

  // 1. Scores of all experts, where they are needed.
  const bool grouped = options.num_groups > 1, score_first = options.score_order == ScoreOrder::kScoreThenTopK;
  const bool choose_by_score = score_first && (bias || grouped);
  const bool score_all = score_first && (options.score_function == ScoreFunction::kSoftmax || choose_by_score);
  if (score_all) score(options.score_function, z, num_experts, work.scores);

  // 2. The k best. NaN counts as -infinity.
  const W* base = choose_by_score ? work.scores : z;
  for (int64_t e = 0; e < num_experts; ++e) choice[e] = bias ? base[e] + bias[e] : base[e];
  for (int64_t e = 0; e < num_experts; ++e) {
    choice[e] = choice[e] == choice[e] ? choice[e] : -std::numeric_limits<W>::infinity();
  }
  if (grouped) {
    const int64_t kept = keep_best_groups(options, num_experts, work);
    select_top_k(choice, kept, top_k, work.picks, work.order);
    for (int64_t j = 0; j < top_k; ++j) ids[j] = work.candidates[work.picks[j]];
  } else {
    select_top_k(choice, num_experts, top_k, ids, work.order);
  }

  // 3. Their weights.
  if (score_all) {
    for (int64_t j = 0; j < top_k; ++j) weights[j] = work.scores[ids[j]];
  } else {
    for (int64_t j = 0; j < top_k; ++j) choice[j] = z[ids[j]];
    score(options.score_function, choice, top_k, weights);
  }
  const W scale = static_cast<W>(options.routed_scaling_factor);
  if (options.renormalize) {
    const W sum = reduce_sum<W>(top_k, [weights](int64_t j) { return weights[j]; });
    for (int64_t j = 0; j < top_k; ++j) weights[j] /= sum + static_cast<W>(kRenormalizeEps);
  }
  for (int64_t j = 0; j < top_k; ++j) weights[j] *= scale;
  return !infinite;
}

template <typename T>
void route_backward_token(const RouteBackwardArgs& args, int64_t token, const Workspace<Wide<T>>& work) {
  using W = Wide<T>;
  const RouteOptions& options = args.options;
  const int64_t num_experts = args.num_experts;
  const T* __restrict logits = static_cast<const T*>(args.router_logits) + token * num_experts;
  const W* __restrict grad_weights = static_cast<const W*>(args.grad_topk_weights) + token * args.top_k;
  const int32_t* __restrict ids = args.topk_ids + token * args.top_k;
  T* __restrict grad_logits = static_cast<T*>(args.grad_router_logits) + token * num_experts;
  const bool is_softmax = options.score_function == ScoreFunction::kSoftmax;
  const bool score_first = options.score_order == ScoreOrder::kScoreThenTopK;

  // 1. The selection (ids out of range left out): ids, gradients g and weights w before renormalisation.
  int32_t* __restrict picks = work.picks;
  W* __restrict g = work.choice;
  W* __restrict w = work.group_scores;
  int64_t n = 0;
  for (int64_t j = 0; j < args.top_k; ++j) {
    if (ids[j] < 0 || ids[j] >= num_experts) continue;
    picks[n] = ids[j];
    g[n++] = grad_weights[j] * static_cast<W>(options.routed_scaling_factor);
  }
  W* __restrict z = work.logits;
  if (score_first && is_softmax) {
    for (int64_t e = 0; e < num_experts; ++e) z[e] = widen(logits[e]);
    softmax(z, num_experts, work.scores);
    for (int64_t j = 0; j < n; ++j) w[j] = work.scores[picks[j]];
  } else {
    for (int64_t j = 0; j < n; ++j) z[j] = widen(logits[picks[j]]);
    score(options.score_function, z, n, w);
  }

  // 2. Through the renormalisation.
  const auto dot = [n, g](const W* x) { return reduce_sum<W>(n, [g, x](int64_t j) { return g[j] * x[j]; }); };
  if (options.renormalize) {
    const W sum = reduce_sum<W>(n, [w](int64_t j) { return w[j]; }) + static_cast<W>(kRenormalizeEps);
    const W mean = dot(w) / sum;
    for (int64_t j = 0; j < n; ++j) g[j] = (g[j] - mean) / sum;
  }

  // 3. Through the scores; `z` becomes the gradient.
  const W mean = is_softmax ? dot(w) : W{0};
  if (score_first && is_softmax) {
    for (int64_t e = 0; e < num_experts; ++e) z[e] = -mean * work.scores[e];
  } else {
    std::fill_n(z, num_experts, W{0});
  }
  for (int64_t j = 0; j < n; ++j) {
    if (!is_softmax) {
      z[picks[j]] += g[j] * w[j] * (1 - w[j]);
    } else {
      z[picks[j]] += w[j] * (score_first ? g[j] : g[j] - mean);
    }
  }
  for (int64_t e = 0; e < num_experts; ++e) grad_logits[e] = narrow<T>(z[e]);
}

// Calls fn(std::type_identity<T>{}, token, workspace) for every token.
template <typename Args, typename Fn>
Status for_each_token(const Args& args, const ThreadPool& pool, const Fn& fn) {
  const int64_t num_experts = args.num_experts;
  const int64_t chunks = num_chunks(pool, args.num_tokens, items_of_work(kLogitGrain, num_experts));
  return dispatch(args.dtype, [&]<typename T>(std::type_identity<T> type) {
    using Work = Workspace<Wide<T>>;
    // The selection's arrays have a place per choice, which may exceed E when a user's ids repeat.
    const int64_t size = std::max(num_experts, args.top_k);
    const Scratch<Wide<T>> wide(chunks * Work::kArrays * size);
    const Scratch<int32_t> ints(chunks * Work::kArrays * size);
    if (!wide || !ints) return Status::kOutOfMemory;
    parallel_chunks(pool, args.num_tokens, chunks, [&](int64_t chunk, int64_t begin, int64_t end) {
      const Work work = Work::of_chunk(chunk, size, wide.get(), ints.get());
      for (int64_t token = begin; token < end; ++token) fn(type, token, work);
    });
    return Status::kOk;
  });
}

}  // namespace

Status route_cpu(const RouteArgs& args, const ThreadPool& pool) {
  std::atomic<bool> finite = true;
  const Status status = for_each_token(args, pool, [&]<typename T>(std::type_identity<T>, int64_t token, auto& work) {
    if (!route_token<T>(args, token, work)) finite.store(false, std::memory_order_relaxed);
  });
  if (status != Status::kOk) return status;
  return args.options.check_finite && !finite ? Status::kNonFiniteLogits : Status::kOk;
}

Status route_backward_cpu(const RouteBackwardArgs& args, const ThreadPool& pool) {
  return for_each_token(args, pool, [&]<typename T>(std::type_identity<T>, int64_t token, auto& work) {
    route_backward_token<T>(args, token, work);
  });
}

}  // namespace moe
