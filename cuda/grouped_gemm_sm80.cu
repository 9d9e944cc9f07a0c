#include "grouped_gemm_sm80.cuh"

namespace moe::cuda {

Status gemm_sm80(const GemmTask& task, const CudaContext& cuda) {
  return task.dtype == DType::kBFloat16  ? sm80::run_gemm<__nv_bfloat16>(task, cuda)
         : task.dtype == DType::kFloat16 ? sm80::run_gemm<__half>(task, cuda)
                                         : sm80::run_gemm<float>(task, cuda);
}

Status wgrad_sm80(const WgradTask& task, const CudaContext& cuda) {
  return task.dtype == DType::kBFloat16  ? sm80::run_wgrad<__nv_bfloat16>(task, cuda)
         : task.dtype == DType::kFloat16 ? sm80::run_wgrad<__half>(task, cuda)
                                         : sm80::run_wgrad<float>(task, cuda);
}

}  // namespace moe::cuda
