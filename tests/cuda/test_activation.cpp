#include "moe/activation.h"

#include "scalar_activation.h"
#include "stages.h"

namespace moe::test {
namespace {

// The functions err by a few units of the wide type; a fast exponential by up to |x| of them.
constexpr double kUnits = 24;

template <typename T>
void check_activation(const ActivationOptions& o, int64_t rows, int64_t width, int64_t offset) {
  const int64_t pitch = pre_activation_size(o.activation, width);
  auto pre = random_values<T>(rows * pitch, 1, 2);
  if (pre.size() > 8) pre[3] = narrow<T>(static_cast<Wide<T>>(-70)), pre[7] = narrow<T>(static_cast<Wide<T>>(70));
  const auto grad = random_values<T>(rows * width, 2);
  const std::vector<double> wide_pre = to_double(pre), wide_grad = to_double(grad);
  auto expected = unwritten<double>(rows * width), expected_grad = unwritten<double>(rows * pitch);
  activation_cpu({expected.data(), wide_pre.data(), rows, width, DType::kFloat64, o}, kPool<1>);
  activation_backward_cpu({expected_grad.data(), wide_grad.data(), wide_pre.data(), rows, width, DType::kFloat64, o},
                          kPool<1>);

  DeviceArray<T> in(pre, offset), grad_in(grad, offset), out(rows * width, offset), grad_out(rows * pitch, offset);
  const WrittenOnce once(out), once_grad(grad_out);
  run_on_device([&](const CudaContext& device) {
    return activation_cuda({out.data(), in.data(), rows, width, kDType<T>, o}, device);
  });
  run_on_device([&](const CudaContext& device) {
    return activation_backward_cuda({grad_out.data(), grad_in.data(), in.data(), rows, width, kDType<T>, o}, device);
  });
  const auto got = out.host(), got_grad = grad_out.host();
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t j = 0; j < width; ++j) {
      const auto [g, u] = places(o, j, width);
      const double size = std::abs(wide_pre[r * pitch + g]) + 1, up = std::abs(wide_pre[r * pitch + u]) + 1;
      const double dy = std::abs(wide_grad[r * width + j]);
      CHECK(agrees(got[r * width + j], expected[r * width + j], size * up, kUnits));
      CHECK(agrees(got_grad[r * pitch + g], expected_grad[r * pitch + g], dy * size * up, kUnits));
      CHECK(agrees(got_grad[r * pitch + u], expected_grad[r * pitch + u], dy * size * up, kUnits));
    }
  }
}

TEST(activation_of_every_kind) {
  for_each_type([]<typename T>(std::type_identity<T>) {
    for (const ActivationOptions& o : all_activations()) {
      const Context c("activation " + std::to_string(static_cast<int>(o.activation)));
      for (const int64_t offset : {0, 1}) {
        check_activation<T>(o, 5, 48, offset);
        check_activation<T>(o, 3, 35, offset);
      }
    }
  });
}

TEST(activation_of_edge_shapes) {
  const ActivationOptions o{Activation::kSwiGLU, GateLayout::kConcat, 1, INFINITY, 0};
  for (const auto& [rows, width] : {std::pair<int64_t, int64_t>{0, 8}, {4, 0}, {1, 1}, {700, 8}, {2, 5000}}) {
    check_activation<BFloat16>(o, rows, width, 0);
  }
}

// A NaN stays one, in every kind; a gate of -infinity is what the CPU makes of it.
TEST(activation_of_nan) {
  for (const ActivationOptions& o : all_activations()) {
    const int64_t width = 8, pitch = pre_activation_size(o.activation, width);
    std::vector<float> pre(pitch, 1);
    for (int64_t j = 0; j < width; ++j) pre[places(o, j, width).first] = NAN;
    DeviceArray<float> in(pre), out(std::vector<float>(width, 0));
    run_on_device([&](const CudaContext& device) {
      return activation_cuda({out.data(), in.data(), 1, width, DType::kFloat32, o}, device);
    });
    for (const float x : out.host()) CHECK(std::isnan(x));
  }
}

}  // namespace
}  // namespace moe::test
