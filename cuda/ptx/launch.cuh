// Shared memory and launches, spelt so that the same source also compiles for the CPU.
#pragma once

#include <cuda_runtime.h>

#include "ptx/define.cuh"

// T* name: the dynamic shared memory of the launch, 1024-byte aligned (the swizzle pattern of TMA and wgmma).
#define SMEM_DYN(T, name)                                          \
  extern __shared__ __align__(1024) unsigned char moe_smem_dyn_[]; \
  T* name = reinterpret_cast<T*>(moe_smem_dyn_)
// T name[n] in static shared memory.
#define SMEM_ARRAY(T, name, n) __shared__ T name[n]
// kernel<<<grid, block, smem, stream>>>(...); a template with several arguments goes in parentheses.
#define LAUNCH(kernel, grid, block, smem, stream, ...) kernel<<<grid, block, smem, stream>>>(__VA_ARGS__)
// The same with the attributes of a moe::cuda::ptx::Launch.
#define LAUNCH_EX(kernel, launch, ...) ::moe::cuda::ptx::launch_kernel(kernel, launch, __VA_ARGS__)
// True when the test-suite runs with this bug planted: `if (!MOE_BUG(plan, 3)) __syncthreads();`. See
// tests/cuda/mutants.py. Always false in a real build, where it costs nothing.
#define MOE_BUG(stage, n) false

namespace moe::cuda::ptx {

struct Launch {
  dim3 grid, block;
  size_t smem = 0;
  cudaStream_t stream = nullptr;
  unsigned cluster = 1;           // blocks of x that share a cluster
  bool overlap_previous = false;  // programmatic dependent launch: the kernel calls grid_dependency_wait()
};

// Like <<<>>>, leaves its error to cudaGetLastError().
template <typename... P, typename... A>
void launch_kernel(void (*kernel)(P...), const Launch& launch, A&&... arguments) {
  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t config = {};
  config.gridDim = launch.grid;
  config.blockDim = launch.block;
  config.dynamicSmemBytes = launch.smem;
  config.stream = launch.stream;
  config.attrs = attributes;
  if (launch.cluster > 1) {
    cudaLaunchAttribute& a = attributes[config.numAttrs++];
    a.id = cudaLaunchAttributeClusterDimension;
    a.val.clusterDim = {launch.cluster, 1, 1};
  }
  if (launch.overlap_previous) {
    cudaLaunchAttribute& a = attributes[config.numAttrs++];
    a.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    a.val.programmaticStreamSerializationAllowed = 1;
  }
  (void)cudaLaunchKernelEx(&config, kernel, static_cast<P>(arguments)...);
}

}  // namespace moe::cuda::ptx
