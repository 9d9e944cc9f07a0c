// route of a run of tokens (formulas: moe/route.h).
#pragma once

#include "route/select.h"
#include "route/weights.h"

namespace moe::MOE_ISA {

// Keeps the experts of the best groups: moves their `choice` to the front, and their groups' numbers, ascending, to
// work.groups; or, with the zero mask, sets the choice of the others to 0. Returns how many may be chosen.
template <typename Real>
int64_t keep_best_groups(const RouteOptions& options, int64_t num_experts, const RouteWorkspace<Real>& work) {
  const int64_t num_groups = options.num_groups, size = num_experts / num_groups;
  for (int64_t g = 0; g < num_groups; ++g) {
    work.group_scores[g] = group_score(options.group_score, work.choice + g * size, size);
  }
  for (int64_t g = num_groups; g < route_padded(num_groups); ++g) work.group_scores[g] = kNone<Real>;
  choose(work.group_scores, num_groups, options.topk_groups, work.picks, work.order);
  for (int64_t g = 0; g < num_groups; ++g) work.order[g] = 0;
  for (int64_t i = 0; i < options.topk_groups; ++i) work.order[work.picks[i]] = 1;

  if (options.group_mask == GroupMask::kZero) {
    for (int64_t g = 0; g < num_groups; ++g) {
      for (int64_t i = g * size; i < (g + 1) * size; ++i) work.choice[i] = work.order[g] ? work.choice[i] : 0;
    }
    return num_experts;
  }
  int64_t kept = 0;
  for (int64_t g = 0; g < num_groups; ++g) {
    if (!work.order[g]) continue;
    for (int64_t i = 0; i < size; ++i) work.choice[kept * size + i] = work.choice[g * size + i];
    work.groups[kept++] = static_cast<int32_t>(g);
  }
  for (int64_t i = kept * size; i < route_padded(kept * size); ++i) work.choice[i] = kNone<Real>;
  return kept * size;
}

// Writes the ids of the best experts by `base`: the scores, or the logits, which are `ordered` when none is NaN.
template <typename Real>
void select(const RouteArgs& args, const Real* base, bool ordered, const RouteWorkspace<Real>& work, int32_t* ids) {
  const int64_t num_experts = args.num_experts, top_k = args.top_k;
  const Real* bias = static_cast<const Real*>(args.expert_bias);
  if (ordered && !bias && args.options.num_groups == 1) return choose(base, num_experts, top_k, ids, work.order);

  Real* choice = work.choice;
  for_vectors<Real>(num_experts, [&](auto load, auto store) {
    Vec<Real> c = load(base);
    if (bias) c += load(bias);
    store(choice, c == c ? c : broadcast(kNone<Real>));
  });
  for (int64_t e = num_experts; e < route_padded(num_experts); ++e) choice[e] = kNone<Real>;

  if (args.options.num_groups == 1) return choose(choice, num_experts, top_k, ids, work.order);
  const int32_t size = static_cast<int32_t>(num_experts / args.options.num_groups);
  choose(choice, keep_best_groups(args.options, num_experts, work), top_k, ids, work.order);
  if (args.options.group_mask == GroupMask::kZero) return;
  for (int64_t j = 0; j < top_k; ++j) ids[j] = work.groups[ids[j] / size] * size + ids[j] % size;
}

// Returns false when a logit is not finite and that matters.
template <typename T>
bool route_token(const RouteArgs& args, int64_t token, const RouteWorkspace<Wide<T>>& work) {
  using Real = Wide<T>;
  const RouteOptions& options = args.options;
  const int64_t num_experts = args.num_experts, top_k = args.top_k;
  Real* weights = static_cast<Real*>(args.topk_weights) + token * top_k;
  int32_t* ids = args.topk_ids + token * top_k;
  Real* z = work.logits;
  const bool finite = load_logits(static_cast<const T*>(args.router_logits) + token * num_experts, num_experts, z);

  // 1. Scores of all experts, where they are needed.
  const bool choose_by_score = options.score_order == ScoreOrder::kScoreThenTopK && !args.route_override &&
                               (args.expert_bias || options.num_groups > 1);
  std::optional<Softmax<Real>> of_all;
  if (scores_all(options)) {
    of_all = softmax(z, route_padded(num_experts), choose_by_score ? work.scores : nullptr);
  } else if (choose_by_score) {
    score(options.score_function, z, route_padded(num_experts), work.scores);
  }

  // 2. The k best.
  if (args.route_override) {
    std::memcpy(ids, args.route_override + token * top_k, static_cast<size_t>(top_k) * sizeof(int32_t));
  } else {
    select(args, choose_by_score ? work.scores : z, finite, work, ids);
  }

  // 3. Their weights; an id out of range has none.
  const auto valid = [num_experts](int32_t id) { return id >= 0 && id < num_experts; };
  int64_t n = 0;
  for (int64_t j = 0; j < top_k; ++j) {
    work.picks[n] = ids[j];
    n += valid(ids[j]);
  }
  if (choose_by_score) {
    for (int64_t j = 0; j < n; ++j) work.weights[j] = work.scores[work.picks[j]];
  } else {
    weigh(options, z, of_all, n, work);
  }
  const Real scale = static_cast<Real>(options.routed_scaling_factor);
  const Real divisor = options.renormalize ? norm(options, work.weights, n).divisor : Real{1};
  n = 0;
  for (int64_t j = 0; j < top_k; ++j) weights[j] = valid(ids[j]) ? work.weights[n++] / divisor * scale : 0;
  return finite || !options.check_finite;
}

template <typename T>
bool forward(const RouteArgs& args, int64_t begin, int64_t end, const RouteWorkspace<Wide<T>>& work) {
  bool finite = true;
  for (int64_t token = begin; token < end; ++token) finite &= route_token<T>(args, token, work);
  return finite;
}

}  // namespace moe::MOE_ISA
