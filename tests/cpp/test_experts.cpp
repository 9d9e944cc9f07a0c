#include "moe/experts.h"

#include <algorithm>

#include "scalar_activation.h"
#include "support.h"

namespace moe::test {
namespace {

// A layer's tensors in their type, and the same in double with out_in weights.
template <typename T>
struct Layer {
  const Problem& p;
  const Plan& plan;
  ActivationOptions activation;
  WeightLayout layout;
  bool biased;
  int64_t pre = pre_activation_size(activation.activation, p.intermediate_size);
  std::vector<T> x = random_values<T>(p.num_tokens * p.hidden_size, 1);
  std::vector<T> w1 = random_values<T>(p.num_experts * pre * p.hidden_size, 2, 1 / std::sqrt(p.hidden_size + 1));
  std::vector<T> w2 =
      random_values<T>(p.num_experts * p.hidden_size * p.intermediate_size, 3, 1 / std::sqrt(p.intermediate_size + 1));
  std::vector<T> b1 = random_values<T>(p.num_experts * pre, 4), b2 = random_values<T>(p.num_experts * p.hidden_size, 5);
  std::vector<Wide<T>> s = random_values<Wide<T>>(p.num_rows(), 6);
  std::vector<T> grad_output = random_values<T>(p.num_tokens * p.hidden_size, 7);

  ExpertsLayer args() const {
    return {x.data(), w1.data(),    w2.data(),     biased ? b1.data() : nullptr, biased ? b2.data() : nullptr,
            s.data(), plan.view(p), p.hidden_size, p.intermediate_size,          kDType<T>,
            layout,   activation};
  }
  // Element (out, in) of expert e of a weight with `outs` x `ins` elements.
  size_t place(int64_t e, int64_t out, int64_t in, int64_t outs, int64_t ins) const {
    return e * outs * ins + (layout == WeightLayout::kOutIn ? out * ins + in : in * outs + out);
  }
};

struct Gradients {
  std::vector<double> output, x, w1, w2, b1, b2, s;
};

// Forward and backward, slot by slot, in double. Only for plans whose maps are inverse.
template <typename T>
Gradients reference(const Layer<T>& l) {
  const Problem& p = l.p;
  const int64_t h = p.hidden_size, n = p.intermediate_size, pre = l.pre;
  Gradients g{std::vector<double>(l.x.size()),  std::vector<double>(l.x.size()),  std::vector<double>(l.w1.size()),
              std::vector<double>(l.w2.size()), std::vector<double>(l.b1.size()), std::vector<double>(l.b2.size()),
              std::vector<double>(l.s.size())};
  for (int64_t slot = 0; slot < p.num_rows(); ++slot) {
    if (l.plan.slot_to_row[slot] < 0) continue;
    const int64_t t = slot / p.top_k, e = p.topk_ids[slot];
    const double s = l.s[slot];
    std::vector<double> hidden(pre), act(n), grad_hidden(pre), grad_act(n);
    for (int64_t i = 0; i < pre; ++i) {
      hidden[i] = l.biased ? widen(l.b1[e * pre + i]) : 0;
      for (int64_t j = 0; j < h; ++j) {
        hidden[i] += static_cast<double>(widen(l.w1[l.place(e, i, j, pre, h)])) * widen(l.x[t * h + j]);
      }
    }
    for (int64_t i = 0; i < n; ++i) {
      const auto [gate, up] = places(l.activation, i, n);
      act[i] = activate(l.activation, hidden[gate], hidden[up]);
    }
    for (int64_t j = 0; j < h; ++j) {
      const double grad = widen(l.grad_output[t * h + j]);
      double y = l.biased ? widen(l.b2[e * h + j]) : 0;
      for (int64_t i = 0; i < n; ++i) {
        const double w = widen(l.w2[l.place(e, j, i, h, n)]);
        y += w * act[i];
        grad_act[i] += w * s * grad;
        g.w2[l.place(e, j, i, h, n)] += s * grad * act[i];
      }
      g.output[t * h + j] += s * y;
      g.s[slot] += grad * y;
      g.b2[e * h + j] += s * grad;
    }
    for (int64_t i = 0; i < n; ++i) {
      constexpr double kStep = 0x1p-20;
      const auto [gate, up] = places(l.activation, i, n);
      const auto slope = [&](double by_gate, double by_up) {
        return (activate(l.activation, hidden[gate] + by_gate, hidden[up] + by_up) -
                activate(l.activation, hidden[gate] - by_gate, hidden[up] - by_up)) /
               (2 * kStep);
      };
      grad_hidden[gate] = grad_act[i] * slope(kStep, 0);
      if (is_gated(l.activation.activation)) grad_hidden[up] = grad_act[i] * slope(0, kStep);
    }
    for (int64_t i = 0; i < pre; ++i) {
      g.b1[e * pre + i] += grad_hidden[i];
      for (int64_t j = 0; j < h; ++j) {
        g.w1[l.place(e, i, j, pre, h)] += grad_hidden[i] * widen(l.x[t * h + j]);
        g.x[t * h + j] += grad_hidden[i] * widen(l.w1[l.place(e, i, j, pre, h)]);
      }
    }
  }
  return g;
}

template <typename T>
auto run_forward(const Layer<T>& l, bool save) {
  return run_on_pools([&](const ThreadPool& pool) {
    auto output = unwritten<T>(l.x.size()), pre = unwritten<T>(save ? l.p.num_rows() * l.pre : 0);
    CHECK(experts_cpu({output.data(), save ? pre.data() : nullptr, l.args()}, pool) == Status::kOk);
    return std::tuple(output, pre);
  });
}

template <typename T>
auto run_backward(const Layer<T>& l, const std::vector<T>& pre, bool recompute) {
  return run_on_pools([&](const ThreadPool& pool) {
    auto x = unwritten<T>(l.x.size()), w1 = unwritten<T>(l.w1.size()), w2 = unwritten<T>(l.w2.size()),
         b1 = unwritten<T>(l.b1.size()), b2 = unwritten<T>(l.b2.size());
    auto s = unwritten<Wide<T>>(l.s.size());
    CHECK(experts_backward_cpu(
              {x.data(), w1.data(), w2.data(), l.biased ? b1.data() : nullptr, l.biased ? b2.data() : nullptr, s.data(),
               l.grad_output.data(), recompute ? nullptr : pre.data(), l.args()},
              pool) == Status::kOk);
    return std::tuple(x, w1, w2, b1, b2, s);
  });
}

// Relative to the largest element: a handful of roundings to T on the way, each as large as eps.
template <typename T, typename Element>
bool all_close(const std::vector<Element>& got, const std::vector<double>& expected) {
  double largest = 1e-2;
  for (const double x : expected) largest = std::max(largest, std::abs(x));
  for (size_t i = 0; i < got.size(); ++i) {
    if (!(std::abs(widen(got[i]) - expected[i]) <= (16 * kEps<T> + 64 * kEps<Wide<T>> + 1e-8) * largest)) return false;
  }
  return true;
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

constexpr ActivationOptions kSwiGLU{Activation::kSwiGLU, GateLayout::kConcat, 1, INFINITY, 0};

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

TEST(experts_with_garbage_plans) {
  for (const Problem& p : problems()) {
    if (p.name == "many_slots") continue;
    const Context c(p.name);
    for (const uint32_t seed : {1, 2, 3}) {
      const Plan plan = garbage_plan(p, seed);
      const Layer<float> l{p, plan, kSwiGLU, WeightLayout::kOutIn, true};
      const auto [output, pre] = run_forward(l, true);
      for (const float value : output) CHECK(std::isfinite(value));
      for (const float value : pre) CHECK(std::isfinite(value));
      std::apply(
          [](const auto&... gradients) {
            const auto finite = [](const auto& g) {
              return std::ranges::all_of(g, [](auto v) { return std::isfinite(v); });
            };
            CHECK((finite(gradients) && ...));
          },
          run_backward(l, pre, seed == 2));
    }
  }
}

}  // namespace
}  // namespace moe::test
