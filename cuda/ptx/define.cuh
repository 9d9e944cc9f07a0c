// Words that the device wrappers share.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#define MOE_DEVICE __device__ __forceinline__

// What exists only from sm_90 on, or only in the architecture-specific sm_90a, is hidden from other device passes, so
// that a wrong use is a compile error. The host pass sees everything.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define MOE_PTX_SM90 1
#else
#define MOE_PTX_SM90 0
#endif
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define MOE_PTX_SM90A 1
#else
#define MOE_PTX_SM90A 0
#endif
