// Where a tensor map comes from: a function of the driver, which is looked up, so that nothing links to libcuda.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

namespace moe::cuda {

// Null where the driver does not have it.
inline decltype(&cuTensorMapEncodeTiled) find_tensor_map_encoder() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
#else
  const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &result);
#endif
  if (error == cudaSuccess) return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  (void)cudaGetLastError();  // or the next launch would find it
  return nullptr;
}

}  // namespace moe::cuda
