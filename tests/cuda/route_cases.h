// A route by the CUDA kernels against the CPU core in fp64: what the tests of the router share.
#pragma once

#include <algorithm>
#include <limits>

#include "moe/route.h"
#include "stages.h"

namespace moe::test {

inline constexpr double kNan = std::numeric_limits<double>::quiet_NaN(), kInf = std::numeric_limits<double>::infinity();
inline constexpr RouteOptions kDefault;
inline constexpr ScoreFunction kScoreFunctions[] = {ScoreFunction::kSoftmax, ScoreFunction::kSigmoid,
                                                    ScoreFunction::kSqrtSoftplus};
inline constexpr ScoreOrder kScoreOrders[] = {ScoreOrder::kScoreThenTopK, ScoreOrder::kTopKThenScore};

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

}  // namespace moe::test
