// Scores by the approximate functions of the hardware, good enough to choose by. Written so that no compiler rounds
// them differently in two places.
#pragma once

#include "ptx/ptx.cuh"

namespace moe::cuda {

constexpr float kLog2E = 1.44269504088896340736f;

__device__ __forceinline__ float sigmoid_approx(float z) {
  return ptx::reciprocal_approx(__fadd_rn(1, ptx::exp2_approx(__fmul_rn(z, -kLog2E))));
}

// The root of max(z, 0) + log1p(t), t = exp(-|z|). log1p(t) / t has no zero, so a polynomial of it keeps t's relative
// precision.
__device__ __forceinline__ float sqrt_softplus_approx(float z) {
  constexpr float kFactors[] = {0.00523262424f, -0.0295049567f, 0.0782254934f, -0.13663207f, 0.191059887f,
                                -0.248429775f,  0.333190948f,   -0.499994934f, 0.99999994f};
  const float t = ptx::exp2_approx(__fmul_rn(fabsf(z), -kLog2E));
  float quotient = kFactors[0];
#pragma unroll
  for (int i = 1; i < static_cast<int>(sizeof(kFactors) / sizeof(float)); ++i) {
    quotient = __fmaf_rn(quotient, t, kFactors[i]);
  }
  return ptx::sqrt_approx(__fmaf_rn(quotient, t, z < 0 ? 0 : z));
}

}  // namespace moe::cuda
