#include "grouped_gemm_simt.cuh"

namespace moe::cuda {
namespace {

template <typename T, int kRows>
Status run(const GemmTask& task, const CudaContext& cuda) {
  return task.weight_layout == WeightLayout::kOutIn ? simt::launch_gemm<T, kRows, WeightLayout::kOutIn>(task, cuda)
                                                    : simt::launch_gemm<T, kRows, WeightLayout::kInOut>(task, cuda);
}

}  // namespace

Status gemm_simt(const GemmTask& task, const CudaContext& cuda) {
  if (task.dtype == DType::kFloat64) return run<double, 64>(task, cuda);
  return task.schedule.tile_rows == 64 ? run<float, 64>(task, cuda) : run<float, 128>(task, cuda);
}

Status wgrad_simt(const WgradTask& task, const CudaContext& cuda) {
  return task.dtype == DType::kFloat64 ? simt::launch_wgrad<double>(task, cuda) : simt::launch_wgrad<float>(task, cuda);
}

}  // namespace moe::cuda
