#include "moe/route.h"

#include <algorithm>
#include <array>
#include <limits>
#include <numeric>

#include "support.h"

namespace moe::test {
namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN(), kInf = std::numeric_limits<double>::infinity();
constexpr RouteOptions kDefault;
constexpr ScoreFunction kScoreFunctions[] = {ScoreFunction::kSoftmax, ScoreFunction::kSigmoid,
                                             ScoreFunction::kSqrtSoftplus};

std::vector<double> scores(ScoreFunction function, const std::vector<double>& z) {
  std::vector<double> v(z.size());
  const double largest = *std::ranges::max_element(z);
  for (size_t i = 0; i < z.size(); ++i) {
    v[i] = function == ScoreFunction::kSoftmax   ? std::exp(z[i] - largest)
           : function == ScoreFunction::kSigmoid ? 1 / (1 + std::exp(-z[i]))
                                                 : std::sqrt(std::log1p(std::exp(z[i])));
  }
  if (function == ScoreFunction::kSoftmax) {
    const double sum = std::accumulate(v.begin(), v.end(), 0.0);
    for (double& x : v) x /= sum;
  }
  return v;
}

std::vector<double> pick(const std::vector<double>& values, const std::vector<int32_t>& ids) {
  std::vector<double> result;
  for (const int32_t id : ids) result.push_back(values[id]);
  return result;
}

// The weights of given experts.
std::vector<double> weights_of(const RouteOptions& o, const std::vector<double>& z, const std::vector<int32_t>& ids) {
  std::vector<double> w = o.score_order == ScoreOrder::kScoreThenTopK ? pick(scores(o.score_function, z), ids)
                                                                      : scores(o.score_function, pick(z, ids));
  double power_sum = 0;
  for (const double x : w) power_sum += std::pow(x, o.renormalize_p);
  const double length = std::pow(power_sum, 1 / o.renormalize_p), eps = o.renormalize_eps;
  const double divisor = o.renormalize_eps_mode == EpsMode::kAdd ? length + eps : std::max(length, eps);
  for (double& x : w) x *= o.routed_scaling_factor / (o.renormalize ? divisor : 1);
  return w;
}

std::vector<int32_t> best(const std::vector<double>& c, int64_t k) {
  std::vector<int32_t> order(c.size());
  std::iota(order.begin(), order.end(), 0);
  std::ranges::stable_sort(order, [&](int32_t a, int32_t b) { return c[a] > c[b]; });
  order.resize(k);
  return order;
}

// The experts chosen for finite logits.
std::vector<int32_t> choose(const RouteOptions& o, const std::vector<double>& z, const std::vector<double>& bias,
                            int64_t top_k) {
  const bool steered = !bias.empty() || o.num_groups > 1;
  std::vector<double> c = steered && o.score_order == ScoreOrder::kScoreThenTopK ? scores(o.score_function, z) : z;
  for (size_t e = 0; e < bias.size(); ++e) c[e] += bias[e];
  if (o.num_groups > 1) {
    const size_t size = c.size() / o.num_groups;
    std::vector<double> group_scores;
    for (size_t g = 0; g < c.size(); g += size) {
      std::vector<double> sorted(c.begin() + g, c.begin() + g + size);
      std::ranges::sort(sorted, std::greater());
      group_scores.push_back(sorted[0] + (size > 1 && o.group_score == GroupScore::kTop2Sum ? sorted[1] : 0));
    }
    const auto kept = best(group_scores, o.topk_groups);
    for (size_t e = 0; e < c.size(); ++e) {
      if (std::ranges::find(kept, static_cast<int32_t>(e / size)) == kept.end()) {
        c[e] = o.group_mask == GroupMask::kZero ? 0 : -kInf;
      }
    }
  }
  return best(c, top_k);
}

template <typename T>
struct Routed {
  std::vector<Wide<T>> weights;
  std::vector<int32_t> ids;
};

template <typename T>
Routed<T> run_route(const std::vector<T>& logits, const std::vector<Wide<T>>& bias, int64_t num_experts, int64_t top_k,
                    const RouteOptions& o, Status expected = Status::kOk) {
  const int64_t num_tokens = static_cast<int64_t>(logits.size()) / num_experts;
  const auto [weights, ids] = run_on_pools([&](const ThreadPool& pool) {
    auto weights = unwritten<Wide<T>>(num_tokens * top_k);
    auto ids = unwritten<int32_t>(num_tokens * top_k);
    CHECK(route_cpu({weights.data(), ids.data(), logits.data(), bias.empty() ? nullptr : bias.data(), nullptr,
                     num_tokens, num_experts, top_k, kDType<T>, o},
                    pool) == expected);
    return std::tuple(weights, ids);
  });
  return {weights, ids};
}

template <typename T>
void check_route(int64_t num_tokens, int64_t num_experts, int64_t top_k, const RouteOptions& o, bool biased) {
  const auto logits = random_values<T>(num_tokens * num_experts, 1, 2);
  const auto bias = random_values<Wide<T>>(biased ? num_experts : 0, 2, 0.1);
  const auto routed = run_route<T>(logits, bias, num_experts, top_k, o);
  const auto z = to_double(logits), b = to_double(bias);
  const auto grad = random_values<Wide<T>>(num_tokens * top_k, 3);
  const auto [grad_logits] = run_on_pools([&](const ThreadPool& pool) {
    auto grad_logits = unwritten<T>(num_tokens * num_experts);
    CHECK(route_backward_cpu({grad_logits.data(), grad.data(), logits.data(), routed.ids.data(), num_tokens,
                              num_experts, top_k, kDType<T>, o},
                             pool) == Status::kOk);
    return std::tuple(grad_logits);
  });
  for (int64_t t = 0; t < num_tokens; ++t) {
    std::vector<double> row(z.begin() + t * num_experts, z.begin() + (t + 1) * num_experts);
    const std::vector<int32_t> ids(routed.ids.begin() + t * top_k, routed.ids.begin() + (t + 1) * top_k);
    CHECK(ids == choose(o, row, b, top_k));
    const auto w = weights_of(o, row, ids);
    for (int64_t j = 0; j < top_k; ++j) {
      CHECK(std::abs(routed.weights[t * top_k + j] - w[j]) <= 64 * kEps<Wide<T>> * o.routed_scaling_factor);
    }
    if (num_experts > 64) continue;  // central differences cost E per logit
    for (int64_t e = 0; e < num_experts; ++e) {
      constexpr double kStep = 0x1p-16;
      std::vector<double> above = row, below = row;
      above[e] += kStep;
      below[e] -= kStep;
      const auto high = weights_of(o, above, ids), low = weights_of(o, below, ids);
      double expected = 0, magnitude = 1;
      for (int64_t j = 0; j < top_k; ++j) {
        expected += grad[t * top_k + j] * (high[j] - low[j]) / (2 * kStep);
        magnitude += std::abs(grad[t * top_k + j]) * o.routed_scaling_factor;
      }
      CHECK(std::abs(widen(grad_logits[t * num_experts + e]) - expected) <=
            kEps<T> * std::abs(expected) + (64 * kEps<Wide<T>> + 1e-9) * magnitude + (sizeof(T) == 2 ? 0x1p-24 : 0));
    }
  }
}

TEST(route_of_every_kind) {
  struct Size {
    int64_t num_experts, top_k, num_groups, topk_groups;
  };
  for (const auto& [e, k, groups, kept] : {Size{8, 2, 1, 1},
                                           {1, 1, 1, 1},
                                           {33, 7, 1, 1},
                                           {64, 20, 4, 2},
                                           {24, 24, 1, 1},
                                           {16, 3, 16, 4},
                                           {2048, 8, 1, 1},
                                           {256, 8, 8, 4},
                                           {100, 17, 1, 1}}) {
    for (const auto function : kScoreFunctions) {
      for (const auto order : {ScoreOrder::kScoreThenTopK, ScoreOrder::kTopKThenScore}) {
        for (const bool renormalize : {false, true}) {
          for (const bool biased : {false, true}) {
            const Context c("E " + std::to_string(e) + " K " + std::to_string(k) +
                            (function == ScoreFunction::kSoftmax   ? " softmax"
                             : function == ScoreFunction::kSigmoid ? " sigmoid"
                                                                   : " sqrt-softplus") +
                            (order == ScoreOrder::kScoreThenTopK ? " score-first" : " topk-first") +
                            (renormalize ? " renormalized" : "") + (biased ? " biased" : ""));
            const RouteOptions o{.score_function = function,
                                 .score_order = order,
                                 .renormalize = renormalize,
                                 .routed_scaling_factor = 2.5,
                                 .num_groups = groups,
                                 .topk_groups = kept};
            for_each_type([&]<typename T>(std::type_identity<T>) { check_route<T>(5, e, k, o, biased); });
          }
        }
      }
    }
  }
}

TEST(route_of_every_norm) {
  for (const double p : {1.0, 2.0, 3.5}) {
    for (const double eps : {0.0, 0.25, 20.0}) {
      for (const auto mode : {EpsMode::kAdd, EpsMode::kClamp}) {
        for (const auto function : kScoreFunctions) {
          const Context c("p " + std::to_string(p) + " eps " + std::to_string(eps));
          const RouteOptions o{
              .score_function = function, .renormalize_p = p, .renormalize_eps = eps, .renormalize_eps_mode = mode};
          for_each_type([&]<typename T>(std::type_identity<T>) { check_route<T>(5, 12, 3, o, true); });
        }
      }
    }
  }
}

TEST(route_of_every_kind_of_group) {
  for (const auto& [e, groups, kept, k] :
       {std::array<int64_t, 4>{24, 6, 2, 5}, {100, 5, 2, 7}, {64, 1, 1, 4}, {160, 8, 3, 6}, {40, 40, 20, 20}}) {
    for (const auto score : {GroupScore::kTop2Sum, GroupScore::kMax}) {
      for (const auto mask : {GroupMask::kNegativeInfinity, GroupMask::kZero}) {
        for (const auto order : {ScoreOrder::kScoreThenTopK, ScoreOrder::kTopKThenScore}) {
          const Context c("E " + std::to_string(e) + " groups " + std::to_string(groups));
          const RouteOptions o{.score_order = order,
                               .num_groups = groups,
                               .topk_groups = kept,
                               .group_score = score,
                               .group_mask = mask};
          for_each_type([&]<typename T>(std::type_identity<T>) { check_route<T>(9, e, k, o, true); });
        }
      }
    }
  }
}

// Many equal values leave the quick selection no threshold.
TEST(route_of_few_distinct_logits) {
  for (const int64_t num_experts : {64, 129, 1000}) {
    for (const int64_t k : {1, 8, 16, 17}) {
      std::vector<float> logits(num_experts * 5);
      std::mt19937 engine(7);
      for (float& x : logits) x = static_cast<float>(engine() % 3);
      const auto routed = run_route<float>(logits, {}, num_experts, k, kDefault);
      for (int64_t t = 0; t < 5; ++t) {
        const std::vector<double> row(logits.begin() + t * num_experts, logits.begin() + (t + 1) * num_experts);
        CHECK((std::vector<int32_t>(routed.ids.begin() + t * k, routed.ids.begin() + (t + 1) * k) == best(row, k)));
      }
    }
  }
}

TEST(route_override_is_weighed_and_nothing_else) {
  const std::vector<int32_t> ids{3, 1, -1, 2, 900, 0};
  const auto logits = random_values<double>(8, 1);
  for (const auto function : kScoreFunctions) {
    for (const auto order : {ScoreOrder::kScoreThenTopK, ScoreOrder::kTopKThenScore}) {
      const RouteOptions o{.score_function = function, .score_order = order};
      std::vector<double> weights = unwritten<double>(6);
      std::vector<int32_t> out = unwritten<int32_t>(6);
      CHECK(route_cpu({weights.data(), out.data(), logits.data(), nullptr, ids.data(), 2, 4, 3, DType::kFloat64, o},
                      kPool<1>) == Status::kOk);
      CHECK(out == ids);
      for (int64_t t = 0; t < 2; ++t) {
        const std::vector<double> row(logits.begin() + 4 * t, logits.begin() + 4 * t + 4);
        const std::vector<int32_t> valid = t == 0 ? std::vector<int32_t>{3, 1} : std::vector<int32_t>{2, 0};
        const auto expected = weights_of(o, row, valid);
        const std::vector<size_t> places = t == 0 ? std::vector<size_t>{0, 1, 2} : std::vector<size_t>{0, 2, 1};
        CHECK(std::abs(weights[3 * t + places[0]] - expected[0]) < 1e-12);
        CHECK(std::abs(weights[3 * t + places[1]] - expected[1]) < 1e-12);
        CHECK(weights[3 * t + places[2]] == 0);
      }
    }
  }
}

TEST(route_of_many_and_no_tokens) {
  check_route<float>(3000, 8, 2, kDefault, false);
  check_route<float>(0, 8, 2, kDefault, true);
}

TEST(route_ties_go_to_the_lower_id) {
  for (const int64_t k : {1, 5, 40}) {
    const auto routed = run_route<float>(std::vector<float>(40, 0.5f), {}, 40, k, kDefault);
    for (int64_t j = 0; j < k; ++j) CHECK(routed.ids[j] == j);
  }
}

// Whatever the logits, the ids are K distinct experts; NaN shows in the weights, and in checked mode as an error.
TEST(route_of_nan_and_infinity) {
  for (const int64_t k : {1, 2, 20, 32}) {
    for (const int64_t groups : {1, 4}) {
      for (const bool biased : {false, true}) {
        std::vector<double> logits = random_values<double>(32 * 6, 4);
        logits[3] = kNan;
        for (int64_t e = 0; e < 32; ++e) logits[32 + e] = kNan;
        for (int64_t e = 0; e < 32; ++e) logits[64 + e] = -kInf;
        logits[96] = kInf;
        for (int64_t e = 0; e < 16; ++e) logits[128 + 2 * e] = e % 2 ? kInf : kNan;
        RouteOptions o = kDefault;
        o.num_groups = o.topk_groups = groups;
        const auto routed = run_route<double>(logits, std::vector<double>(biased ? 32 : 0, 0.25), 32, k, o);
        for (int64_t t = 0; t < 6; ++t) {
          std::vector<int32_t> ids(routed.ids.begin() + t * k, routed.ids.begin() + (t + 1) * k);
          std::ranges::sort(ids);
          CHECK(ids.front() >= 0 && ids.back() < 32 && std::ranges::adjacent_find(ids) == ids.end());
        }
        CHECK(std::isnan(routed.weights[0]) && std::isnan(routed.weights[k]));
        o.check_finite = true;
        run_route<double>(logits, {}, 32, k, o, Status::kNonFiniteLogits);
        run_route<double>(std::vector<double>(64, 1e300), {}, 32, k, o, Status::kOk);
      }
    }
  }
}

// NaN comes after every number, also after -infinity by its id, in the short and in the long selection.
TEST(route_of_nan_comes_last) {
  const auto ids = [](const std::vector<double>& logits, int64_t k) {
    return run_route<double>(logits, {}, static_cast<int64_t>(logits.size()), k, kDefault).ids;
  };
  CHECK((ids({kNan, 1, 3, kNan, 2}, 3) == std::vector<int32_t>{2, 4, 1}));
  CHECK((ids({kNan, 1, 3, kNan, 2}, 5) == std::vector<int32_t>{2, 4, 1, 0, 3}));
  std::vector<double> logits(40, kNan);
  std::vector<int32_t> expected;
  for (int32_t e = 39; e > 0; e -= 2) {
    logits[e] = e;
    expected.push_back(e);
  }
  CHECK(ids(logits, 20) == expected);
}

// A group whose two best are infinity and -infinity has no sum; it must not win.
TEST(route_of_groups_without_a_sum) {
  RouteOptions o = kDefault;
  o.score_order = ScoreOrder::kTopKThenScore;  // choose by the logits themselves
  o.num_groups = 4;
  o.topk_groups = 2;
  const auto routed = run_route<double>({kInf, -kInf, 1, 2, 5, 6, kInf, -kInf}, {}, 8, 2, o);
  CHECK((routed.ids == std::vector<int32_t>{5, 4}));
}

TEST(route_backward_ignores_ids_out_of_range) {
  // More choices than experts, with repetitions.
  const std::vector<int32_t> ids{-1, 3, 900, std::numeric_limits<int32_t>::min(), 0, 3, 1, 2, 1, 0};
  const auto logits = random_values<double>(4, 1), grad = random_values<double>(10, 2);
  for (const auto function : kScoreFunctions) {
    for (const auto order : {ScoreOrder::kScoreThenTopK, ScoreOrder::kTopKThenScore}) {
      auto grad_logits = unwritten<double>(4);
      const RouteOptions o{.score_function = function, .score_order = order};
      route_backward_cpu({grad_logits.data(), grad.data(), logits.data(), ids.data(), 1, 4, 10, DType::kFloat64, o},
                         kPool<1>);
      for (const double g : grad_logits) CHECK(std::isfinite(g));
    }
  }
}

}  // namespace
}  // namespace moe::test
