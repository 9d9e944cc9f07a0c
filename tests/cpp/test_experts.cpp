#include "moe/experts.h"

#include <algorithm>

#include "experts_reference.h"

namespace moe::test {
namespace {

template <typename T>
auto forward(const Layer<T>& l, bool save, const ThreadPool& pool) {
  auto output = unwritten<T>(l.x.size()), pre = unwritten<T>(save ? l.p.num_rows() * l.pre : 0);
  CHECK(experts_cpu({output.data(), save ? pre.data() : nullptr, l.args()}, pool) == Status::kOk);
  return std::tuple(output, pre);
}

template <typename T>
auto run_forward(const Layer<T>& l, bool save) {
  return run_on_pools([&](const ThreadPool& pool) { return forward(l, save, pool); });
}

template <typename T>
auto backward(const Layer<T>& l, const std::vector<T>& pre, bool recompute, const ThreadPool& pool) {
  auto x = unwritten<T>(l.x.size()), w1 = unwritten<T>(l.w1.size()), w2 = unwritten<T>(l.w2.size()),
       b1 = unwritten<T>(l.b1.size()), b2 = unwritten<T>(l.b2.size());
  auto s = unwritten<Wide<T>>(l.s.size());
  CHECK(experts_backward_cpu(
            {x.data(), w1.data(), w2.data(), l.biased ? b1.data() : nullptr, l.biased ? b2.data() : nullptr, s.data(),
             l.grad_output.data(), recompute ? nullptr : pre.data(), l.args()},
            pool) == Status::kOk);
  return std::tuple(x, w1, w2, b1, b2, s);
}

template <typename T>
auto run_backward(const Layer<T>& l, const std::vector<T>& pre, bool recompute) {
  return run_on_pools([&](const ThreadPool& pool) { return backward(l, pre, recompute, pool); });
}

template <typename T>
void check_experts(const Problem& p, const Plan& plan, const ActivationOptions& activation, WeightLayout layout,
                   bool biased) {
  const Layer<T> l{p, plan, activation, layout, biased};
  const Gradients expected = reference(l);
  const auto [output, pre] = run_forward(l, true);
  CHECK(same_bits(std::get<0>(run_forward(l, false)), output));
  CHECK(all_close<T>(output, expected.output));
  const int64_t rows = plan.expert_offsets.back();
  for (int64_t i = rows * l.pre; i < p.num_rows() * l.pre; ++i) CHECK(widen(pre[i]) == 0);
  for (const bool recompute : {false, true}) {
    const Context c(recompute ? "recomputed" : "saved");
    const auto [x, w1, w2, b1, b2, s] = run_backward(l, pre, recompute);
    CHECK(all_close<T>(x, expected.x));
    CHECK(all_close<T>(w1, expected.w1));
    CHECK(all_close<T>(w2, expected.w2));
    CHECK(all_close<T>(s, expected.s));
    if (biased) CHECK(all_close<T>(b1, expected.b1) && all_close<T>(b2, expected.b2));
  }
}

TEST(experts_of_every_shape) {
  for (const Problem& p : problems()) {
    if (p.name == "many_slots") continue;
    const Context c(p.name);
    for_each_type([&]<typename T>(std::type_identity<T>) {
      for (const WeightLayout layout : {WeightLayout::kOutIn, WeightLayout::kInOut}) {
        for (const bool biased : {false, true}) {
          check_experts<T>(p, sorted_plan(p), kSwiGLU, layout, biased);
          check_experts<T>(p, sorted_plan(p, 3), kSwiGLU, layout, biased);
        }
      }
    });
  }
}

TEST(experts_of_every_activation) {
  const std::vector<Problem> all = problems();
  const Problem& p = *std::ranges::find(all, "unaligned", &Problem::name);
  for (const ActivationOptions& activation : all_activations()) {
    const Context c("activation " + std::to_string(static_cast<int>(activation.activation)));
    check_experts<double>(p, sorted_plan(p), activation, WeightLayout::kOutIn, true);
    check_experts<float>(p, sorted_plan(p), activation, WeightLayout::kInOut, true);
  }
}

// Everything is written, and nothing outside. Not the same bits for all pools: a token of a top-1 plan that has several
// rows all the same gets them in either order.
TEST(experts_with_garbage_plans) {
  const auto finite = [](const auto&... outputs) {
    return (std::ranges::all_of(outputs, [](auto v) { return std::isfinite(v); }) && ...);
  };
  for (const Problem& p : problems()) {
    if (p.name == "many_slots") continue;
    const Context c(p.name);
    for (const uint32_t seed : {1, 2, 3}) {
      const Plan plan = garbage_plan(p, seed);
      const Layer<float> l{p, plan, kSwiGLU, WeightLayout::kOutIn, true};
      for (const ThreadPool& pool : {kPool<1>, kPool<3>, kPool<7>}) {
        const auto outputs = forward(l, true, pool);
        CHECK(std::apply(finite, outputs));
        CHECK(std::apply(finite, backward(l, std::get<1>(outputs), seed == 2, pool)));
      }
    }
  }
}

}  // namespace
}  // namespace moe::test
