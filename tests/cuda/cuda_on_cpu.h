// Forced include (g++ -x c++ -include cuda_on_cpu.h) with which a .cu file compiles for the CPU and runs there: one
// fiber per CUDA thread, under a scheduler that is steered by a seed. emu/ has the machinery, README.md the ideas.
#pragma once

#define CUDA_ON_CPU 1

// Standard headers come first: CUDA's macros (__noinline__ ...) break them.
#include <algorithm>
#include <array>
#include <cassert>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

// CUDA's headers keep these words if they are defined already.
#define __host__
#define __device__
#define __global__
#define __constant__
#define __managed__
#define __grid_constant__
#define __shared__ use_SMEM_ARRAY_or_SMEM_DYN_instead_of___shared__
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <vector_functions.h>
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __forceinline__
#define __forceinline__ inline
#undef __noinline__

#include "emu/emu.h"
#include "emu/intrinsics.h"

#define SMEM_DYN(T, name) T* name = reinterpret_cast<T*>(::emu::dynamic_smem())
// The address of the tag tells one array from another.
#define SMEM_ARRAY(T, name, n)      \
  static const char tag_##name = 0; \
  T(&name)[n] = *reinterpret_cast<T(*)[n]>(::emu::static_smem(&tag_##name, sizeof(T) * (n), alignof(T)))
#define LAUNCH(kernel, grid, block, smem, stream, ...) \
  ::emu::launch_kernel(kernel, #kernel, ::emu::Launch{grid, block, static_cast<size_t>(smem), stream}, ##__VA_ARGS__)
#define LAUNCH_EX(kernel, launch, ...) ::emu::launch_kernel(kernel, #kernel, launch, ##__VA_ARGS__)
// One bug is planted per process, named in the environment: MOE_BUG=plan:3.
#define MOE_BUG(stage, n) (::emu::planted_bug == ::emu::bug_id(#stage, n) && ::emu::reached_bug())
