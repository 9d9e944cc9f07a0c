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

}  // namespace moe::cuda::ptx
