// Arithmetic that CUDA C++ reaches only with more instructions around it.
#pragma once

#include "ptx/define.cuh"

namespace moe::cuda::ptx {

// 9.7.3.21 ex2.approx.ftz: 2^x with a relative error of 2^-22; results below 2^-126 are 0.
MOE_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 9.7.3.12 max.NaN: NaN if either is; fmaxf takes the number.
MOE_DEVICE float max_or_nan(float x, float y) {
  float larger;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(x), "f"(y));
  return larger;
}

// 9.7.3.13 rcp.approx.ftz: 1 / x with an error of one last bit; numbers below 2^-126, given or computed, are 0.
MOE_DEVICE float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 9.7.3.15 sqrt.approx.ftz: the root with a relative error of 2^-23; numbers below 2^-126 count as 0.
MOE_DEVICE float sqrt_approx(float x) {
  float y;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace moe::cuda::ptx
