// What every operator needs to queue kernels: the stream, checked launches, scratch, and facts about the device.
//
//   LAUNCH(some_kernel, grid, block, shared_bytes, stream(cuda), arguments...);
//   return launched("some_kernel", cuda);
#pragma once

#include <cuda_runtime_api.h>

#include <utility>

#include "moe/cuda.h"
#include "ptx/ptx.cuh"

namespace moe::cuda {

inline cudaStream_t stream(const CudaContext& cuda) { return static_cast<cudaStream_t>(cuda.stream); }

// kOk, or kCudaError after the caller was told what `kernel` suffered. The runtime also keeps the error of a call for
// cudaGetLastError(), where the next launch would find it.
inline Status check(cudaError_t error, const char* kernel, const CudaContext& cuda) {
  if (error == cudaSuccess) return Status::kOk;
  (void)cudaGetLastError();
  cuda.report(kernel, cudaGetErrorString(error), cuda.context);
  return Status::kCudaError;
}

// Of the launch just made. It reads the error state, and so clears it for the next call.
inline Status launched(const char* kernel, const CudaContext& cuda) { return check(cudaGetLastError(), kernel, cuda); }

// kCudaError for a call that no kernel serves; `reason` is a sentence for the user.
inline Status unsupported(const char* op, const char* reason, const CudaContext& cuda) {
  cuda.report(op, reason, cuda.context);
  return Status::kCudaError;
}

// First in a kernel that may be launched as overlapping(): waits for the kernel before it, then lets the next one come.
__device__ __forceinline__ void after_previous_kernel() {
#if defined(CUDA_ON_CPU) || MOE_PTX_SM90
  if (!MOE_BUG(grouped_gemm_sm90, 28)) ptx::grid_dependency_wait();
  ptx::grid_dependency_launch();
#endif
}

// Scratch for `count` elements; null when there is none. Never asks for 0 bytes, so that null means one thing.
template <typename T>
T* allocate(int64_t count, const CudaContext& cuda) {
  return static_cast<T*>(cuda.allocate(static_cast<int64_t>(sizeof(T)) * (count > 0 ? count : 1), cuda.context));
}

// A fact about the current device. cudaDeviceGetAttribute, as cudaGetDeviceProperties takes milliseconds.
inline Status device_attribute(int& value, cudaDeviceAttr attribute, const CudaContext& cuda) {
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  return check(error == cudaSuccess ? cudaDeviceGetAttribute(&value, attribute, device) : error, "device attribute",
               cuda);
}

// 10 times the compute capability of the current device.
inline Status architecture(int& value, const CudaContext& cuda) {
  int major = 0, minor = 0;
  for (const auto& [part, attribute] :
       {std::pair{&major, cudaDevAttrComputeCapabilityMajor}, std::pair{&minor, cudaDevAttrComputeCapabilityMinor}}) {
    if (const Status status = device_attribute(*part, attribute, cuda); status != Status::kOk) return status;
  }
  value = 10 * major + minor;
  return Status::kOk;
}

// Programmatic dependent launch: the blocks take over SMs as those of the kernel before leave them, and are set up when
// its last block ends, which saves the launch latency and most of the tail between the kernels of a layer (prediction
// for an H200: 2 us of 3 at each of them). Only where the code that runs is that of sm_90: PTX of sm_80, which other
// GPUs compile, does not wait. There it is a launch like any other.
inline ptx::Launch overlapping(dim3 grid, dim3 block, size_t smem, const CudaContext& cuda) {
  ptx::Launch launch{.grid = grid, .block = block, .smem = smem, .stream = stream(cuda)};
#if defined(CUDA_ON_CPU) || defined(MOE_CUDA_SM90)
  int major = 0;
  launch.overlap_previous =
      device_attribute(major, cudaDevAttrComputeCapabilityMajor, cuda) == Status::kOk && major == 9;
#endif
  return launch;
}

// What a kernel may ask for of dynamic shared memory without more ado, and with allow_shared_memory on every GPU since
// Ampere: 48 and 99 KB, less 1 KB for its arrays (SMEM_ARRAY), which count too. Beside SMEM_DYN they take a multiple of
// its alignment.
constexpr int64_t kPlainSharedBytes = 47 << 10, kMostSharedBytes = 96 << 10;

// Lets `kernel` be launched with that much dynamic shared memory. The number must be the same in all calls for a
// kernel: another thread may set it between this and the launch.
template <typename Kernel>
Status allow_shared_memory(Kernel* kernel, int64_t bytes, const char* name, const CudaContext& cuda) {
  if (bytes <= kPlainSharedBytes) return Status::kOk;
  return check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(bytes)),
               name, cuda);
}

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
__host__ __device__ constexpr int64_t at_most(int64_t n, int64_t limit) { return n < limit ? n : limit; }

}  // namespace moe::cuda
