#include "support.h"

#include "scalar_activation.h"

namespace moe::test {
namespace {

std::string name_of(const ActivationOptions& o) {
  return "activation " + std::to_string(static_cast<int>(o.activation)) + " layout " +
         std::to_string(static_cast<int>(o.gate_layout));
}

template <typename T>
void check_activation(const ActivationOptions& o, int64_t rows, int64_t width, double scale) {
  const int64_t stride = pre_activation_size(o.activation, width);
  const auto input = random_values<T>(rows * stride, 1, scale), grad = random_values<T>(rows * width, 2);
  const auto [output, grad_input] = run_on_pools([&](const ThreadPool& pool) {
    auto output = unwritten<T>(rows * width), grad_input = unwritten<T>(rows * stride);
    CHECK(activation_cpu({output.data(), input.data(), rows, width, kDType<T>, o}, pool) == Status::kOk);
    CHECK(activation_backward_cpu({grad_input.data(), grad.data(), input.data(), rows, width, kDType<T>, o}, pool) ==
          Status::kOk);
    return std::tuple(output, grad_input);
  });
  // A few roundings in the wide type, relative to the product's factors, and one to T. The slope's own error, of
  // central differences, is 1e-8.
  const auto close = [](T got, double expected, double magnitude, double slack) {
    return std::abs(widen(got) - expected) <=
           kEps<T> * std::abs(expected) + 32 * kEps<Wide<T>> * magnitude + slack + (sizeof(T) == 2 ? 0x1p-24 : 0);
  };
  for (int64_t i = 0; i < rows * width; ++i) {
    const auto [gate_place, up_place] = places(o, i % width, width);
    const double gate = widen(input[i / width * stride + gate_place]), up = widen(input[i / width * stride + up_place]);
    const double g = widen(grad[i]), magnitude = (1 + gate * gate) * (1 + std::abs(up)) * (1 + std::abs(g));
    CHECK(close(output[i], activate(o, gate, up), magnitude, 0));
    constexpr double kStep = 0x1p-20;
    const double by_gate = (activate(o, gate + kStep, up) - activate(o, gate - kStep, up)) / (2 * kStep);
    CHECK(close(grad_input[i / width * stride + gate_place], g * by_gate, magnitude, 1e-8 * magnitude));
    if (is_gated(o.activation)) {
      const double by_up = (activate(o, gate, up + kStep) - activate(o, gate, up - kStep)) / (2 * kStep);
      CHECK(close(grad_input[i / width * stride + up_place], g * by_up, magnitude, 1e-8 * magnitude));
    }
  }
}

TEST(activation_and_its_slope) {
  for (const ActivationOptions& o : all_activations()) {
    const Context c(name_of(o));
    for_each_type([&]<typename T>(std::type_identity<T>) {
      for (const int64_t width : {1, 16, 53}) check_activation<T>(o, 19, width, 2);
      check_activation<T>(o, 0, 8, 1);
    });
  }
}

// Far from zero nothing overflows on the way to a finite result.
TEST(activation_of_large_values) {
  for (const ActivationOptions& o : all_activations()) {
    const Context c(name_of(o));
    const int64_t stride = pre_activation_size(o.activation, 4);
    for (const float x : {-1000.0f, -89.0f, -20.0f, 20.0f, 89.0f, 1000.0f}) {
      const std::vector<float> input(stride, x), grad(4, 1);
      auto output = unwritten<float>(4), grad_input = unwritten<float>(stride);
      activation_cpu({output.data(), input.data(), 1, 4, DType::kFloat32, o}, kPool<1>);
      activation_backward_cpu({grad_input.data(), grad.data(), input.data(), 1, 4, DType::kFloat32, o}, kPool<1>);
      const double expected = activate(o, x, x);
      CHECK(std::abs(output[0] - expected) <= 1e-5 * std::abs(expected) + 1e-5);
      for (const float value : grad_input) CHECK(std::isfinite(value));
    }
  }
}

}  // namespace
}  // namespace moe::test
