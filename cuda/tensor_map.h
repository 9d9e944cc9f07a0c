// Where a tensor map comes from: a function of the driver, which is looked up, so that nothing links to libcuda.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

namespace moe::cuda {

// Null where the driver does not have it. Looked up once: a layer makes up to ten maps per call.
inline decltype(&cuTensorMapEncodeTiled) tensor_map_encoder() {
  static const auto encoder = []() -> decltype(&cuTensorMapEncodeTiled) {
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
  }();
  return encoder;
}

}  // namespace moe::cuda
