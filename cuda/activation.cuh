// The activations and their derivatives on the device (formulas: moe/activation.h), for activation.cu and for the
// epilogues of the GEMMs:
//
//   const Gate<T> gate(options);                          // on the host: a kernel argument
//   with_activation(gate.kind, [&](auto act) {            // uniform over the launch: outside the loops
//     a = activate<T>(act, gate, g, u);
//     const auto d = activate_backward<T>(act, gate, grad, g, u);   // d.value, d.grad_gate, d.grad_up
//   });
// T is the type of the stored tensors; everything is computed in Wide<T>.
#pragma once

#include <cmath>

#include "elements.cuh"
#include "moe/activation.h"

namespace moe::cuda {

// bf16 and fp16 round the result far more coarsely than the fast exponential and division err, and with the exact ones
// the arithmetic would take longer than the memory.
template <typename T>
__device__ __forceinline__ Wide<T> exponential(Wide<T> x) {
  if constexpr (sizeof(T) == 2)
    return __expf(x);
  else if constexpr (sizeof(T) == 4)
    return expf(x);
  else
    return exp(x);
}
template <typename T>
__device__ __forceinline__ Wide<T> reciprocal(Wide<T> x) {
  if constexpr (sizeof(T) == 2)
    return __fdividef(1.0f, x);
  else
    return Wide<T>{1} / x;
}
template <typename T>
__device__ __forceinline__ Wide<T> sigmoid(Wide<T> x) {
  return reciprocal<T>(1 + exponential<T>(-x));
}

// sigmoid(x) and its derivative s (1 - s), which as written cancels where s is near 1.
template <typename T>
struct SigmoidSlope {
  Wide<T> s, slope;
  __device__ __forceinline__ explicit SigmoidSlope(Wide<T> x) {
    const Wide<T> e = exponential<T>(x > 0 ? -x : x), r = reciprocal<T>(1 + e);
    s = x > 0 ? r : e * r;
    slope = e * r * r;
  }
};

// Phi(x), accurate in the far left tail too.
__device__ __forceinline__ float normal_cdf(float x) { return 0.5f * erfcf(-0.70710678118654752440f * x); }
__device__ __forceinline__ double normal_cdf(double x) { return 0.5 * erfc(-0.70710678118654752440 * x); }

struct SiLU {
  template <typename T>
  static __device__ __forceinline__ Wide<T> value(Wide<T> g, Wide<T> alpha) {
    return g * sigmoid<T>(alpha * g);
  }
  template <typename T>
  static __device__ __forceinline__ Wide<T> slope(Wide<T> g, Wide<T> alpha) {
    const SigmoidSlope<T> sigmoid(alpha * g);
    return sigmoid.s + alpha * g * sigmoid.slope;
  }
};
struct GELU {
  template <typename T>
  static __device__ __forceinline__ Wide<T> value(Wide<T> g, Wide<T>) {
    return g * normal_cdf(g);
  }
  template <typename T>
  static __device__ __forceinline__ Wide<T> slope(Wide<T> g, Wide<T>) {
    constexpr Wide<T> kInverseSqrt2Pi = static_cast<Wide<T>>(0.39894228040143267794);
    return normal_cdf(g) + g * kInverseSqrt2Pi * exponential<T>(g * g * Wide<T>(-0.5));
  }
};
struct GELUTanh {                                                                  // (1 + tanh(x)) / 2 = sigmoid(2 x)
  static constexpr double kScale = 2 * 0.79788456080286535588, kCubic = 0.044715;  // 2 sqrt(2 / pi)
  template <typename T>
  static __device__ __forceinline__ Wide<T> value(Wide<T> g, Wide<T>) {
    return g * sigmoid<T>(Wide<T>(kScale) * (g + Wide<T>(kCubic) * g * g * g));
  }
  template <typename T>
  static __device__ __forceinline__ Wide<T> slope(Wide<T> g, Wide<T>) {
    const SigmoidSlope<T> sigmoid(Wide<T>(kScale) * (g + Wide<T>(kCubic) * g * g * g));
    return sigmoid.s + g * sigmoid.slope * (Wide<T>(kScale) * (1 + Wide<T>(3 * kCubic) * g * g));
  }
};
struct ReLU {
  template <typename T>
  static __device__ __forceinline__ Wide<T> value(Wide<T> g, Wide<T>) {
    return g < 0 ? Wide<T>{0} : g;
  }
  template <typename T>
  static __device__ __forceinline__ Wide<T> slope(Wide<T> g, Wide<T>) {
    return g > 0 ? 1 : 0;
  }
};
struct ReLU2 {
  template <typename T>
  static __device__ __forceinline__ Wide<T> value(Wide<T> g, Wide<T>) {
    return g < 0 ? Wide<T>{0} : g * g;
  }
  template <typename T>
  static __device__ __forceinline__ Wide<T> slope(Wide<T> g, Wide<T>) {
    return g < 0 ? Wide<T>{0} : 2 * g;
  }
};

template <typename Fn>
__device__ __forceinline__ void with_activation(Activation kind, const Fn& fn) {
  switch (kind) {
    case Activation::kSwiGLU:
    case Activation::kSiLU:
      return fn(SiLU{});
    case Activation::kGeGLU:
    case Activation::kGELU:
      return fn(GELU{});
    case Activation::kGeGLUTanh:
    case Activation::kGELUTanh:
      return fn(GELUTanh{});
    case Activation::kReGLU:
    case Activation::kReLU:
      return fn(ReLU{});
    case Activation::kReLU2:
      return fn(ReLU2{});
  }
}

// What a kernel needs of ActivationOptions.
template <typename T>
struct Gate {
  Activation kind;
  bool gated, interleaved;
  Wide<T> alpha, limit, up_offset;

  Gate() = default;
  explicit Gate(const ActivationOptions& options)
      : kind(options.activation),
        gated(is_gated(options.activation)),
        interleaved(gated && options.gate_layout == GateLayout::kInterleaved),
        alpha(kind == Activation::kSwiGLU ? static_cast<Wide<T>>(options.alpha) : 1),
        limit(static_cast<Wide<T>>(options.limit)),
        up_offset(static_cast<Wide<T>>(options.up_offset)) {}

  // A NaN passes through both.
  __device__ __forceinline__ Wide<T> clamp_gate(Wide<T> g) const { return g > limit ? limit : g; }
  __device__ __forceinline__ Wide<T> clamp_up(Wide<T> u) const { return u > limit ? limit : u < -limit ? -limit : u; }
};

// act(g, u), or act(g) when not gated.
template <typename T, typename Act>
__device__ __forceinline__ Wide<T> activate(Act act, const Gate<T>& gate, Wide<T> g, Wide<T> u) {
  if (!gate.gated) return act.template value<T>(g, gate.alpha);
  return act.template value<T>(gate.clamp_gate(g), gate.alpha) * (gate.clamp_up(u) + gate.up_offset);
}

template <typename T>
struct ActivationGrad {
  Wide<T> value, grad_gate, grad_up;  // act(g, u), and the gradients of g and u; grad_up only when gated
};

template <typename T, typename Act>
__device__ __forceinline__ ActivationGrad<T> activate_backward(Act act, const Gate<T>& gate, Wide<T> grad, Wide<T> g,
                                                               Wide<T> u) {
  if (!gate.gated) return {act.template value<T>(g, gate.alpha), grad * act.template slope<T>(g, gate.alpha), 0};
  const Wide<T> clamped = gate.clamp_gate(g), factor = gate.clamp_up(u) + gate.up_offset;
  const Wide<T> value = act.template value<T>(clamped, gate.alpha);
  return {value * factor, g > gate.limit ? 0 : grad * factor * act.template slope<T>(clamped, gate.alpha),
          u > gate.limit || u < -gate.limit ? 0 : grad * value};
}

}  // namespace moe::cuda
