#include "moe/route.h"

#include <algorithm>
#include <array>
#include <limits>

#include "stages.h"

namespace moe::test {
namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN(), kInf = std::numeric_limits<double>::infinity();
constexpr RouteOptions kDefault;
constexpr ScoreFunction kScoreFunctions[] = {ScoreFunction::kSoftmax, ScoreFunction::kSigmoid,
                                             ScoreFunction::kSqrtSoftplus};
constexpr ScoreOrder kScoreOrders[] = {ScoreOrder::kScoreThenTopK, ScoreOrder::kTopKThenScore};

template <typename T>
struct Routed {
  std::vector<Wide<T>> weights;
  std::vector<int32_t> ids;
  int32_t non_finite;
};

template <typename T>
struct RouteCase {
  std::vector<T> logits;
  std::vector<Wide<T>> bias;       // empty: none
  std::vector<int32_t> overrides;  // empty: none
  int64_t num_experts, top_k;
  RouteOptions options;
  int64_t offset = 0;
  int64_t num_tokens() const { return static_cast<int64_t>(logits.size()) / num_experts; }
};

template <typename T>
Routed<T> run_cuda(const RouteCase<T>& c) {
  const int64_t slots = c.num_tokens() * c.top_k;
  DeviceArray<T> logits(c.logits, c.offset);
  DeviceArray<Wide<T>> bias(c.bias), weights(slots);
  DeviceArray<int32_t> overrides(c.overrides), ids(slots), non_finite(1);
  run_on_device([&](const CudaContext& device) {
    return route_cuda({weights.data(), ids.data(), logits.data(), c.bias.empty() ? nullptr : bias.data(),
                       c.overrides.empty() ? nullptr : overrides.data(), c.num_tokens(), c.num_experts, c.top_k,
                       kDType<T>, c.options, non_finite.data()},
                      device);
  });
  return {weights.host(), ids.host(), non_finite.host()[0]};
}

// The CPU core in fp64, whose own tests hold it against the formulas. `ids`: a selection to weigh, or empty.
template <typename T>
Routed<double> run_reference(const RouteCase<T>& c, const std::vector<int32_t>& ids) {
  const std::vector<double> logits = to_double(c.logits), bias = to_double(c.bias);
  auto weights = unwritten<double>(c.num_tokens() * c.top_k);
  auto chosen = unwritten<int32_t>(c.num_tokens() * c.top_k);
  RouteOptions options = c.options;
  options.check_finite = false;
  CHECK(
      route_cpu({weights.data(), chosen.data(), logits.data(), bias.empty() ? nullptr : bias.data(),
                 ids.empty() ? nullptr : ids.data(), c.num_tokens(), c.num_experts, c.top_k, DType::kFloat64, options},
                kPool<1>) == Status::kOk);
  return {weights, chosen, 0};
}

template <typename T>
void check_weights(const RouteCase<T>& c, const Routed<T>& routed) {
  const auto reference = run_reference(c, routed.ids);
  for (size_t i = 0; i < routed.weights.size(); ++i) {
    const double got = routed.weights[i], expected = reference.weights[i];
    if (std::isnan(expected)) {
      CHECK(std::isnan(got));
    } else {
      CHECK(std::abs(got - expected) <=
            64 * kEps<Wide<T>> * std::max(std::abs(expected), c.options.routed_scaling_factor));
    }
  }
}

template <typename T>
void check_backward(const RouteCase<T>& c, const std::vector<int32_t>& ids) {
  const int64_t tokens = c.num_tokens(), experts = c.num_experts;
  const auto grad = random_values<Wide<T>>(tokens * c.top_k, 3);
  const std::vector<double> wide_logits = to_double(c.logits), wide_grad = to_double(grad);
  auto expected = unwritten<double>(tokens * experts);
  route_backward_cpu({expected.data(), wide_grad.data(), wide_logits.data(), ids.data(), tokens, experts, c.top_k,
                      DType::kFloat64, c.options},
                     kPool<1>);
  DeviceArray<T> logits(c.logits, c.offset), out(tokens * experts, c.offset);
  DeviceArray<Wide<T>> grad_in(grad);
  DeviceArray<int32_t> ids_in(ids);
  run_on_device([&](const CudaContext& device) {
    return route_backward_cuda(
        {out.data(), grad_in.data(), logits.data(), ids_in.data(), tokens, experts, c.top_k, kDType<T>, c.options},
        device);
  });
  const auto got = out.host();
  for (int64_t t = 0; t < tokens; ++t) {
    double magnitude = 1;
    for (int64_t j = 0; j < c.top_k; ++j) magnitude += std::abs(wide_grad[t * c.top_k + j]);
    magnitude *= std::max(c.options.routed_scaling_factor, 1.0);
    for (int64_t e = 0; e < experts; ++e) {
      CHECK(agrees(got[t * experts + e], expected[t * experts + e], magnitude, 128));
    }
  }
}

// Logits whose order the rounding of scores cannot change, with an offset so that the row is unaligned now and then.
template <typename T>
RouteCase<T> random_case(int64_t tokens, int64_t experts, int64_t top_k, const RouteOptions& options, bool biased) {
  return {random_values<T>(tokens * experts, 1, 2),
          random_values<Wide<T>>(biased ? experts : 0, 2, 0.1),
          {},
          experts,
          top_k,
          options,
          experts % 2};
}

// Two values of a choice that differ by less than their rounding may change places: ids are compared where the fp64
// reference and the result differ by more. For fp64 that is always.
template <typename T>
void check_route(const RouteCase<T>& c) {
  const auto routed = run_cuda(c);
  const auto reference = run_reference(c, {});
  if (routed.ids != reference.ids) {
    // Compare with the CPU in the same type, which rounds the scores the same way up to the functions' last bits.
    auto weights = unwritten<Wide<T>>(c.num_tokens() * c.top_k);
    auto ids = unwritten<int32_t>(c.num_tokens() * c.top_k);
    route_cpu({weights.data(), ids.data(), c.logits.data(), c.bias.empty() ? nullptr : c.bias.data(), nullptr,
               c.num_tokens(), c.num_experts, c.top_k, kDType<T>, c.options},
              kPool<1>);
    CHECK(routed.ids == ids);
  }
  check_weights(c, routed);
  check_backward(c, routed.ids);
}

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
