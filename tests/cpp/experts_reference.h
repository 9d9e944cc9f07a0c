// A layer's tensors, and its output and gradients in double, for the tests of the CPU and of the CUDA kernels.
#pragma once

#include <algorithm>

#include "moe/experts.h"
#include "scalar_activation.h"
#include "support.h"

namespace moe::test {

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
    if (l.plan.slot_to_row[slot] < 0 || l.plan.slot_to_row[slot] >= std::ssize(l.plan.row_to_slot)) continue;
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

inline constexpr ActivationOptions kSwiGLU{Activation::kSwiGLU, GateLayout::kConcat, 1, INFINITY, 0};

}  // namespace moe::test
