#include "moe/activation.h"

#include <cmath>

#include "convert.h"
#include "exp.h"
#include "parallel.h"

namespace moe {
namespace {

// A value and its derivative.
template <typename W>
struct Dual {
  W value, slope;
};

template <typename W>
Dual<W> silu(W x, W alpha) {
  const W s = sigmoid(alpha * x);
  return {x * s, s + alpha * x * s * (1 - s)};
}

template <typename W>
Dual<W> gelu(W x) {
  const W phi = W(0.5) * (1 + std::erf(x * W(0.70710678118654752)));
  return {x * phi, phi + x * W(0.39894228040143268) * std::exp(W(-0.5) * x * x)};
}

template <typename W>
Dual<W> gelu_tanh(W x) {
  constexpr W kA = W(0.79788456080286536), kB = W(0.044715);
  const W t = std::tanh(kA * (x + kB * x * x * x));
  return {W(0.5) * x * (1 + t), W(0.5) * (1 + t) + W(0.5) * x * (1 - t * t) * kA * (1 + 3 * kB * x * x)};
}

template <typename W>
Dual<W> nonlinearity(const ActivationOptions& options, W x) {
  switch (options.activation) {
    case Activation::kSwiGLU:
      return silu(x, static_cast<W>(options.alpha));
    case Activation::kSiLU:
      return silu(x, W{1});
    case Activation::kGeGLU:
    case Activation::kGELU:
      return gelu(x);
    case Activation::kGeGLUTanh:
    case Activation::kGELUTanh:
      return gelu_tanh(x);
    case Activation::kReLU2:
      return x > 0 ? Dual<W>{x * x, 2 * x} : Dual<W>{0, 0};
    case Activation::kReGLU:
    case Activation::kReLU:
      break;
  }
  return x > 0 ? Dual<W>{x, 1} : Dual<W>{0, 0};
}

// One output element and its derivatives by gate and up value.
template <typename W>
struct Element {
  W value, by_gate, by_up;
};

template <typename W>
Element<W> element(const ActivationOptions& options, W gate, W up) {
  if (!is_gated(options.activation)) {
    const auto [value, slope] = nonlinearity(options, gate);
    return {value, slope, 0};
  }
  const bool swiglu = options.activation == Activation::kSwiGLU;
  const W limit = swiglu ? static_cast<W>(options.limit) : std::numeric_limits<W>::infinity();
  const W offset = swiglu ? static_cast<W>(options.up_offset) : W{0};
  const bool gate_clamped = gate > limit, up_clamped = up > limit || up < -limit;
  const W u = (up_clamped ? std::copysign(limit, up) : up) + offset;
  const auto [value, slope] = nonlinearity(options, gate_clamped ? limit : gate);
  return {value * u, gate_clamped ? 0 : slope * u, up_clamped ? 0 : value};
}

// Places of gate and up value of output column j.
std::pair<int64_t, int64_t> places(const ActivationOptions& options, int64_t j, int64_t intermediate_size) {
  if (!is_gated(options.activation)) return {j, j};
  if (options.gate_layout == GateLayout::kInterleaved) return {2 * j, 2 * j + 1};
  return {j, intermediate_size + j};
}

}  // namespace

Status activation_cpu(const ActivationArgs& args, const ThreadPool& pool) {
  const int64_t width = args.intermediate_size, stride = pre_activation_size(args.options.activation, width);
  dispatch(args.dtype, [&]<typename T>(std::type_identity<T>) {
    parallel_for(pool, args.num_rows, 16, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const T* input = static_cast<const T*>(args.pre_activation) + r * stride;
        for (int64_t j = 0; j < width; ++j) {
          const auto [gate, up] = places(args.options, j, width);
          const auto result = element(args.options, widen(input[gate]), widen(input[up]));
          static_cast<T*>(args.output)[r * width + j] = narrow<T>(result.value);
        }
      }
    });
  });
  return Status::kOk;
}

Status activation_backward_cpu(const ActivationBackwardArgs& args, const ThreadPool& pool) {
  const int64_t width = args.intermediate_size, stride = pre_activation_size(args.options.activation, width);
  dispatch(args.dtype, [&]<typename T>(std::type_identity<T>) {
    parallel_for(pool, args.num_rows, 16, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const T* input = static_cast<const T*>(args.pre_activation) + r * stride;
        T* output = static_cast<T*>(args.grad_pre_activation) + r * stride;
        for (int64_t j = 0; j < width; ++j) {
          const auto [gate, up] = places(args.options, j, width);
          const auto result = element(args.options, widen(input[gate]), widen(input[up]));
          const Wide<T> grad = widen(static_cast<const T*>(args.grad_output)[r * width + j]);
          if (is_gated(args.options.activation)) output[up] = narrow<T>(grad * result.by_up);
          output[gate] = narrow<T>(grad * result.by_gate);
        }
      }
    });
  });
  return Status::kOk;
}

}  // namespace moe
