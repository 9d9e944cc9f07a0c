#include "moe/route.h"

#include <algorithm>
#include <array>
#include <limits>

#include "route_cases.h"

namespace moe::test {
namespace {

TEST(route_of_every_kind) {
  struct Size {
    int64_t num_experts, top_k, num_groups, topk_groups;
  };
  for (const auto& [e, k, groups, kept] :
       {Size{8, 2, 1, 1}, {33, 7, 1, 1}, {64, 20, 4, 2}, {16, 3, 16, 4}, {256, 8, 8, 4}, {700, 8, 1, 1}}) {
    for (const auto function : kScoreFunctions) {
      for (const auto order : kScoreOrders) {
        for (const bool renormalize : {false, true}) {
          const Context c("E " + std::to_string(e) + " K " + std::to_string(k) + " function " +
                          std::to_string(static_cast<int>(function)) + " order " +
                          std::to_string(static_cast<int>(order)) + (renormalize ? " renormalized" : ""));
          const RouteOptions o{.score_function = function,
                               .score_order = order,
                               .renormalize = renormalize,
                               .routed_scaling_factor = 2.5,
                               .num_groups = groups,
                               .topk_groups = kept};
          const int64_t tokens = e > 64 ? 3 : 9;
          for_each_type(
              [&]<typename T>(std::type_identity<T>) { check_route(random_case<T>(tokens, e, k, o, renormalize)); });
        }
      }
    }
  }
}

// Every width of a lane, K to 32 and beyond, E to 4096 and beyond what shared memory holds.
TEST(route_of_every_size) {
  for (const auto& [e, k] : {std::pair<int64_t, int64_t>{1, 1},
                             {32, 32},
                             {40, 40},
                             {64, 8},
                             {100, 17},
                             {128, 8},
                             {130, 1},
                             {255, 3},
                             {512, 10},
                             {513, 4},
                             {4096, 32},
                             {12250, 3},
                             {14000, 3}}) {
    const Context c("E " + std::to_string(e) + " K " + std::to_string(k));
    check_route(random_case<float>(2, e, k, kDefault, false));
    check_route(random_case<BFloat16>(2, e, k, kDefault, true));
    if (e < 1000) check_route(random_case<double>(2, e, k, kDefault, true));
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
          check_route(random_case<float>(3, 12, 3, o, true));
          check_route(random_case<double>(3, 12, 3, o, true));
          check_route(random_case<Float16>(2, 40, 34, o, false));
        }
      }
    }
  }
}

TEST(route_of_every_kind_of_group) {
  for (const auto& [e, groups, kept, k] : {std::array<int64_t, 4>{24, 6, 2, 5},
                                           {100, 5, 2, 7},
                                           {160, 8, 3, 6},
                                           {40, 40, 20, 20},
                                           {64, 8, 2, 9},
                                           {128, 8, 1, 8},
                                           {256, 8, 4, 6},
                                           {512, 8, 7, 8}}) {
    for (const auto group_score : {GroupScore::kTop2Sum, GroupScore::kMax}) {
      for (const auto mask : {GroupMask::kNegativeInfinity, GroupMask::kZero}) {
        for (const auto order : kScoreOrders) {
          const Context c("E " + std::to_string(e) + " groups " + std::to_string(groups));
          const RouteOptions o{.score_order = order,
                               .num_groups = groups,
                               .topk_groups = kept,
                               .group_score = group_score,
                               .group_mask = mask};
          for_each_type([&]<typename T>(std::type_identity<T>) { check_route(random_case<T>(5, e, k, o, true)); });
        }
      }
    }
  }
}

// Of equal values the lower ids, in order; and -0 equals 0.
TEST(route_ties_go_to_the_lower_id) {
  for (const int64_t experts : {40, 128, 600}) {
    for (const int64_t k : {1, 5, 40}) {
      const Context c("E " + std::to_string(experts) + " K " + std::to_string(k));
      std::vector<float> logits(experts * 4);
      std::mt19937 engine(7);
      for (int64_t i = 0; i < experts * 3; ++i) logits[i] = static_cast<float>(engine() % 3) - 1;
      for (int64_t i = experts * 3; i < experts * 4; ++i) logits[i] = i % 2 ? 0.0f : -0.0f;
      const RouteCase<float> route{logits, {}, {}, experts, k, kDefault};
      CHECK(run_cuda(route).ids == run_reference(route, {}).ids);
    }
  }
}

// Many tokens, so that warps are full, and not; every way to have a few lanes per token.
TEST(route_of_many_tokens) {
  for (const auto& [e, k] : {std::pair<int64_t, int64_t>{4, 4},
                             {8, 2},
                             {12, 8},
                             {64, 6},
                             {72, 8},
                             {128, 8},
                             {160, 1},
                             {256, 8},
                             {384, 5},
                             {512, 7},
                             {136, 9},
                             {256, 16},
                             {512, 10}}) {
    for (const auto function : kScoreFunctions) {
      for (const auto order : kScoreOrders) {
        for (const bool biased : {false, true}) {
          const Context c("E " + std::to_string(e) + " K " + std::to_string(k) + " function " +
                          std::to_string(static_cast<int>(function)) + (biased ? " biased" : ""));
          RouteOptions o = kDefault;
          o.score_function = function, o.score_order = order;
          check_route(random_case<float>(37, e, k, o, biased));
          check_route(random_case<BFloat16>(19, e, k, o, biased));
          check_route(random_case<Float16>(9, e, k, o, biased));
        }
      }
    }
  }
}

// Values that differ in their last bits, or not at all, and chosen ones that are -infinity or NaN: no part of a value
// may be lost on the way to a choice.
TEST(route_of_values_that_differ_little) {
  for (const auto& [experts, k, groups] : {std::array<int64_t, 3>{12, 1, 1},
                                           {12, 8, 1},
                                           {64, 2, 1},
                                           {64, 5, 1},
                                           {128, 1, 1},
                                           {128, 5, 1},
                                           {128, 8, 8},
                                           {256, 2, 1},
                                           {256, 8, 1},
                                           {256, 8, 8},
                                           {256, 13, 1},
                                           {512, 5, 1},
                                           {512, 8, 8},
                                           {512, 10, 1},
                                           {512, 16, 1}}) {
    for (const int range : {2, 30, 4000}) {
      for (const auto mask : {GroupMask::kNegativeInfinity, GroupMask::kZero}) {
        if (groups == 1 && mask == GroupMask::kZero) continue;
        const Context c("E " + std::to_string(experts) + " K " + std::to_string(k) + " of " + std::to_string(range) +
                        " groups " + std::to_string(groups));
        RouteOptions o = kDefault;
        if (groups > 1) o.score_order = ScoreOrder::kTopKThenScore;  // the choice is by the logits themselves
        o.num_groups = groups, o.topk_groups = groups > 1 ? 3 : 1, o.group_mask = mask;
        o.group_score = GroupScore::kMax;  // a sum would be rounded
        std::vector<float> logits(experts * 40);
        std::mt19937 engine(11);
        for (float& z : logits) {
          const auto bits = static_cast<float>(engine() % static_cast<uint32_t>(range)) * 0x1p-23f;
          z = engine() % (range == 30 ? 2 : 8) ? -1 - bits : 1 + bits;
          if (engine() % 64 == 0) z = -std::numeric_limits<float>::infinity();
        }
        for (int64_t e = k - 1; e < experts; ++e) logits[e] = -std::numeric_limits<float>::infinity();
        for (int64_t e = k; e < experts; ++e) logits[experts + e] = std::numeric_limits<float>::quiet_NaN();
        const RouteCase<float> route{logits, {}, {}, experts, k, o};
        const auto routed = run_cuda(route);
        CHECK(routed.ids == run_reference(route, {}).ids);
        check_weights(route, routed);
        std::vector<BFloat16> narrower;
        for (const float z : logits) narrower.push_back(narrow<BFloat16>(z));
        const RouteCase<BFloat16> rounded{narrower, {}, {}, experts, k, o};
        CHECK(run_cuda(rounded).ids == run_reference(rounded, {}).ids);
      }
    }
  }
}

// Eight experts in order, each the best of its four, and a better one behind them that differs in the last bits alone.
TEST(route_overlooks_none) {
  for (const int64_t experts : {12, 64, 128, 256, 512}) {
    for (const int64_t k : {1, 2, 8}) {
      const Context c("E " + std::to_string(experts) + " K " + std::to_string(k));
      std::vector<float> logits(experts, -1);
      const int64_t best = experts - 4;
      for (int64_t e = 0; e < std::min<int64_t>(best, 32); e += 4)
        logits[e] = 1 + static_cast<float>(20 - e / 4) * 0x1p-23f;
      logits[best] = 1 + 25 * 0x1p-23f;
      const RouteCase<float> route{logits, {}, {}, experts, k, kDefault};
      const auto routed = run_cuda(route);
      CHECK(routed.ids == run_reference(route, {}).ids && routed.ids[0] == best);
    }
  }
}

TEST(route_override_is_weighed_and_nothing_else) {
  for (const auto function : kScoreFunctions) {
    for (const auto order : kScoreOrders) {
      for (const int64_t experts : {4, 600}) {
        const RouteOptions o{.score_function = function, .score_order = order};
        const std::vector<int32_t> ids{3, 1, -1, 2, 900, 0};
        const RouteCase<float> c{random_values<float>(2 * experts, 1), {}, ids, experts, 3, o};
        const auto routed = run_cuda(c);
        CHECK(routed.ids == ids);
        check_weights(c, routed);
        CHECK(routed.weights[2] == 0 && routed.weights[4] == 0);
        check_backward(c, ids);
        // More choices than a warp has lanes.
        std::vector<int32_t> many;
        for (int32_t i = 0; i < 80; ++i) many.push_back(i % 41);
        const RouteCase<float> wide{random_values<float>(2 * 600, 1), {}, many, 600, 40, o};
        const auto routed_wide = run_cuda(wide);
        CHECK(routed_wide.ids == many);
        check_weights(wide, routed_wide);
      }
    }
  }
}

// Whatever the logits, the ids are K distinct experts; NaN shows in the weights.
template <typename T>
void check_not_finite(int64_t experts, int64_t k, int64_t groups, bool biased, RouteOptions o = kDefault) {
  std::vector<T> logits = random_values<T>(experts * 6, 4);
  const auto set = [&](int64_t i, double x) { logits[i] = narrow<T>(static_cast<Wide<T>>(x)); };
  set(3, kNan);
  for (int64_t e = 0; e < experts; ++e) set(experts + e, kNan);
  for (int64_t e = 0; e < experts; ++e) set(2 * experts + e, -kInf);
  set(3 * experts, kInf);
  for (int64_t e = 0; e < experts / 2; ++e) set(4 * experts + 2 * e, e % 2 ? kInf : kNan);
  o.num_groups = groups;
  o.topk_groups = experts == 128 ? 4 : groups;
  o.check_finite = true;
  RouteCase<T> c{logits, std::vector<Wide<T>>(biased ? experts : 0, Wide<T>(0.25)), {}, experts, k, o};
  const auto routed = run_cuda(c);
  CHECK(routed.non_finite == 1);
  for (int64_t t = 0; t < 6; ++t) {
    std::vector<int32_t> ids(routed.ids.begin() + t * k, routed.ids.begin() + (t + 1) * k);
    std::ranges::sort(ids);
    CHECK(ids.front() >= 0 && ids.back() < experts && std::ranges::adjacent_find(ids) == ids.end());
  }
  CHECK(routed.ids == run_reference(c, {}).ids);
  check_weights(c, routed);
  c.logits = random_values<T>(experts * 6, 4);
  CHECK(run_cuda(c).non_finite == 0);
}

TEST(route_of_nan_and_infinity) {
  for (const int64_t k : {1, 20, 32}) {
    for (const int64_t groups : {1, 4}) {
      for (const bool biased : {false, true}) {
        for_each_type([&]<typename T>(std::type_identity<T>) { check_not_finite<T>(32, k, groups, biased); });
      }
    }
  }
  check_not_finite<float>(600, 3, 1, true);
  for (const auto function : kScoreFunctions) {
    for (const auto order : kScoreOrders) {
      const RouteOptions o{.score_function = function, .score_order = order};
      check_not_finite<float>(128, 4, 8, order == ScoreOrder::kScoreThenTopK, o);
      check_not_finite<BFloat16>(512, 12, 1, true, o);
    }
  }
}

// Scores so small that fast functions return 0 for all of them are in the order of their logits all the same.
TEST(route_of_scores_near_zero) {
  for (const auto function : {ScoreFunction::kSigmoid, ScoreFunction::kSqrtSoftplus}) {
    RouteOptions o{.score_function = function, .num_groups = 8, .topk_groups = 4};
    std::vector<float> logits;
    for (int e = 0; e < 2 * 256; ++e) logits.push_back(-84 - static_cast<float>(e * 37 % 256) / 128);
    const RouteCase<float> c{logits, {}, {}, 256, 8, o};
    CHECK(run_cuda(c).ids == run_reference(c, {}).ids);
  }
}

// Groups of equal scores: the lower ones are kept, though the best experts of the others are better than their other
// ones.
TEST(route_groups_that_tie) {
  for (const int64_t experts : {128, 256, 512}) {
    for (const auto group_score : {GroupScore::kTop2Sum, GroupScore::kMax}) {
      const RouteOptions o{
          .score_order = ScoreOrder::kTopKThenScore, .num_groups = 8, .topk_groups = 4, .group_score = group_score};
      const int64_t size = experts / 8;
      std::vector<float> logits(experts);
      for (int64_t e = 0; e < experts; ++e) logits[e] = -2 - static_cast<float>(e) / 1024;
      for (int64_t g = 0; g < 8; ++g) {
        const float part = group_score == GroupScore::kMax ? 0 : static_cast<float>(g) / 8;
        logits[g * size + g] = 3 + part, logits[g * size + size - 1] = -part;
      }
      const RouteCase<float> c{logits, {}, {}, experts, 8, o};
      CHECK(run_cuda(c).ids == run_reference(c, {}).ids);
    }
  }
}

// A group whose two best are infinity and -infinity has no sum; it must not win.
TEST(route_of_groups_without_a_sum) {
  RouteOptions o = kDefault;
  o.score_order = ScoreOrder::kTopKThenScore;  // choose by the logits themselves
  o.num_groups = 4;
  o.topk_groups = 2;
  const std::vector<double> logits{kInf, -kInf, 1, 2, 5, 6, kInf, -kInf};
  CHECK((run_cuda<double>({logits, {}, {}, 8, 2, o}).ids == std::vector<int32_t>{5, 4}));
  const std::vector<float> narrower(logits.begin(), logits.end());
  CHECK((run_cuda<float>({narrower, {}, {}, 8, 2, o}).ids == std::vector<int32_t>{5, 4}));
  o.num_groups = 8;
  for (const int64_t experts : {128, 256, 512}) {
    std::vector<float> many(experts, -static_cast<float>(kInf));
    many[1] = static_cast<float>(kInf);
    for (int64_t e = experts / 8; e < experts; ++e) many[e] = static_cast<float>(e * 37 % experts);
    const RouteCase<float> c{many, {}, {}, experts, 6, o};
    CHECK(run_cuda(c).ids == run_reference(c, {}).ids);
  }
}

TEST(route_backward_adds_up_repeated_ids) {
  const std::vector<int32_t> few{-1, 3, 900, std::numeric_limits<int32_t>::min(), 0, 3, 1, 2, 1, 0};
  std::vector<int32_t> many;
  for (int32_t i = 0; i < 40; ++i) many.push_back(i * 7 % 5);
  for (const auto function : kScoreFunctions) {
    for (const auto order : kScoreOrders) {
      const RouteOptions o{.score_function = function, .score_order = order};
      for (const auto& ids : {few, many}) {
        const auto k = static_cast<int64_t>(ids.size());
        check_backward<float>({random_values<float>(4, 1), {}, {}, 4, k, o}, ids);
        check_backward<double>({random_values<double>(4, 1), {}, {}, 4, k, o}, ids);
      }
    }
  }
}

TEST(route_of_no_tokens) {
  check_route(random_case<float>(0, 8, 2, kDefault, true));
  RouteCase<float> c = random_case<float>(0, 8, 2, kDefault, true);
  c.options.check_finite = true;
  CHECK(run_cuda(c).non_finite == 0);
}

}  // namespace
}  // namespace moe::test
