// The activations and their derivatives on vectors (formulas: moe/activation.h).
#pragma once

#include <cmath>
#include <limits>
#include <utility>

#include "gemm/kernels.h"
#include "gemm/simd.h"

namespace moe::MOE_ISA {

// double exists for gradient checks: lane by lane through the C library.
template <typename Fn>
inline Vec<double> each_lane(Vec<double> x, const Fn& fn) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = fn(x[i]);
  return x;
}

template <typename Real>
inline Vec<Real> min(Vec<Real> x, Vec<Real> y) {
  return x > y ? y : x;  // a NaN in x stays
}
template <typename Real>
inline Vec<Real> max(Vec<Real> x, Vec<Real> y) {
  return x < y ? y : x;
}

// exp(x) within 2 ulp wherever it is a normal number; 0 below, infinity above, NaN stays NaN.
// x = n ln 2 + r with |r| <= ln(2) / 2, a polynomial in r, and 2^n in two halves so that neither overflows; AVX-512 has
// an instruction for that, which gives the same bits.
inline Vec<float> exp(Vec<float> x) {
  constexpr float kLog2E = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, held in the low mantissa bits
  const Vec<float> clamped = min<float>(max<float>(x, broadcast(-104.0f)), broadcast(89.0f));
  const Vec<float> shifted = clamped * kLog2E + kRound;
  const Vec<float> n = shifted - kRound;
  const Vec<float> r = (clamped - n * kLn2High) - n * kLn2Low;
  Vec<float> p = broadcast(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
#if MOE_VECTOR_BYTES == 64
  return reinterpret_cast<Vec<float>>(
      _mm512_maskz_scalef_ps(0xffff, reinterpret_cast<__m512>(p), reinterpret_cast<__m512>(n)));
#else
  const Int exponent = reinterpret_cast<Int>(shifted) - reinterpret_cast<Int>(broadcast(kRound));
  const Int half = exponent >> 1;
  const auto power_of_2 = [](Int e) { return reinterpret_cast<Vec<float>>((e + 127) << 23); };
  return p * power_of_2(half) * power_of_2(exponent - half);
#endif
}
inline Vec<double> exp(Vec<double> x) {
  return each_lane(x, [](double v) { return std::exp(v); });
}

template <typename Real>
inline Vec<Real> sigmoid(Vec<Real> x) {
  return Real(1) / (Real(1) + exp(-x));
}

// sigmoid(x) and its derivative s (1 - s), which as written cancels where s is near 1, and gelu_tanh multiplies by g^3.
template <typename Real>
struct SigmoidSlope {
  Vec<Real> s, slope;
  explicit SigmoidSlope(Vec<Real> x) {
    const Vec<Real> e = exp(x > 0 ? -x : x), r = Real(1) / (Real(1) + e);
    s = x > 0 ? r : e * r;
    slope = e * r * r;
  }
};

// erfc(x) for x >= 0 as exp(-x^2) t P(t), t = 1 / (1 + p x), the form of Abramowitz and Stegun 7.1.26; P fitted with
// a relative error below 1.3e-8.
inline Vec<float> erfc_nonnegative(Vec<float> x) {
  const Vec<float> t = 1.0f / (1.0f + 0.375f * x);
  Vec<float> p = broadcast(0.0615384541f);
  p = p * t - 0.287329525f;
  p = p * t + 0.432397544f;
  p = p * t - 0.229412198f;
  p = p * t + 0.27372393f;
  p = p * t + 0.121505246f;
  p = p * t + 0.205313414f;
  p = p * t + 0.210649654f;
  p = p * t + 0.211613476f;
  return exp(-x * x) * t * p;
}
inline Vec<double> erfc_nonnegative(Vec<double> x) {
  return each_lane(x, [](double v) { return std::erfc(v); });
}

// The normal distribution: Phi(x), accurate in the far left tail too.
template <typename Real>
inline Vec<Real> normal_cdf(Vec<Real> x) {
  constexpr Real kSqrtHalf = static_cast<Real>(0.70710678118654752440);
  const Vec<Real> tail = Real(0.5) * erfc_nonnegative((x < 0 ? -x : x) * kSqrtHalf);
  return x < 0 ? tail : Real(1) - tail;
}

// act(g), and d act(g) / dg, of the scalar activations.
struct SiLU {
  double alpha = 1;
  template <typename Real>
  Vec<Real> value(Vec<Real> g) const {
    return g * sigmoid<Real>(g * static_cast<Real>(alpha));
  }
  template <typename Real>
  Vec<Real> slope(Vec<Real> g) const {
    const Vec<Real> scaled = g * static_cast<Real>(alpha);
    const SigmoidSlope<Real> sigmoid(scaled);
    return sigmoid.s + scaled * sigmoid.slope;
  }
};
struct GELU {
  template <typename Real>
  Vec<Real> value(Vec<Real> g) const {
    return g * normal_cdf<Real>(g);
  }
  template <typename Real>
  Vec<Real> slope(Vec<Real> g) const {
    constexpr Real kInverseSqrt2Pi = static_cast<Real>(0.39894228040143267794);
    return normal_cdf<Real>(g) + g * kInverseSqrt2Pi * exp(g * g * Real(-0.5));
  }
};
struct GELUTanh {  // (1 + tanh(x)) / 2 = sigmoid(2 x)
  template <typename Real>
  static constexpr Real kScale = static_cast<Real>(2 * 0.79788456080286535588);  // 2 sqrt(2 / pi)
  template <typename Real>
  static constexpr Real kCubic = static_cast<Real>(0.044715);
  template <typename Real>
  Vec<Real> value(Vec<Real> g) const {
    return g * sigmoid<Real>(kScale<Real> * (g + kCubic<Real> * g * g * g));
  }
  template <typename Real>
  Vec<Real> slope(Vec<Real> g) const {
    const SigmoidSlope<Real> sigmoid(kScale<Real> * (g + kCubic<Real> * g * g * g));
    return sigmoid.s + g * sigmoid.slope * (kScale<Real> * (Real(1) + Real(3) * kCubic<Real> * g * g));
  }
};
struct ReLU {
  template <typename Real>
  Vec<Real> value(Vec<Real> g) const {
    return max<Real>(g, Vec<Real>{});
  }
  template <typename Real>
  Vec<Real> slope(Vec<Real> g) const {
    return g > 0 ? broadcast(Real(1)) : Vec<Real>{};
  }
};
struct ReLU2 {
  template <typename Real>
  Vec<Real> value(Vec<Real> g) const {
    const Vec<Real> positive = max<Real>(g, Vec<Real>{});
    return positive * positive;
  }
  template <typename Real>
  Vec<Real> slope(Vec<Real> g) const {
    return Real(2) * max<Real>(g, Vec<Real>{});
  }
};

template <typename Fn>
inline void with_scalar_activation(const ActivationOptions& options, const Fn& fn) {
  switch (options.activation) {
    case Activation::kSwiGLU:
      return fn(SiLU{options.alpha});
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

template <typename Real>
void activate(const ActivationOptions& options, const Real* gate, const Real* up, int64_t n, Real* out) {
  const bool gated = is_gated(options.activation);
  const Vec<Real> limit = broadcast(static_cast<Real>(options.limit));
  const Real up_offset = static_cast<Real>(options.up_offset);
  with_scalar_activation(options, [&](auto act) {
    for_vectors<Real>(n, [&](auto load, auto store) {
      const Vec<Real> g = load(gate);
      if (!gated) return store(out, act.template value<Real>(g));
      const Vec<Real> u = max<Real>(min<Real>(load(up), limit), -limit);
      store(out, act.template value<Real>(min<Real>(g, limit)) * (u + up_offset));
    });
  });
}

template <typename Real>
void activate_backward(const ActivationOptions& options, const Real* grad_out, const Real* gate, const Real* up,
                       int64_t n, Real* grad_gate, Real* grad_up) {
  const bool gated = is_gated(options.activation);
  const Vec<Real> limit = broadcast(static_cast<Real>(options.limit)), zero{};
  const Real up_offset = static_cast<Real>(options.up_offset);
  with_scalar_activation(options, [&](auto act) {
    for_vectors<Real>(n, [&](auto load, auto store) {
      const Vec<Real> grad = load(grad_out), g = load(gate);
      if (!gated) return store(grad_gate, grad * act.template slope<Real>(g));
      const Vec<Real> u = load(up), clamped = min<Real>(g, limit);
      const Vec<Real> factor = max<Real>(min<Real>(u, limit), -limit) + up_offset;
      store(grad_gate, g > limit ? zero : grad * factor * act.template slope<Real>(clamped));
      const Vec<Real> value = grad * act.template value<Real>(clamped);
      store(grad_up, u > limit ? zero : u < -limit ? zero : value);
    });
  });
}

}  // namespace moe::MOE_ISA
