// grouped_gemm: one matmul per expert.
//
// For the rows r of expert e, that is expert_offsets[e] <= r < expert_offsets[e + 1]:
//   output[r] = weight[e] rows[r] + bias[e]          weight layout out_in: weight[e] is [N, K]
//   output[r] = weight[e]^T rows[r] + bias[e]        weight layout in_out: weight[e] is [K, N]
// Rows past expert_offsets[E] are written as zeros. dgrad is the same operator with the other layout.
//
// wgrad: output[e] = sum over the rows of e of lhs[r] rhs[r]^T, [M, N]; exactly zero for an expert without rows. With
// accumulate it is added to what is there, and an expert without rows keeps that to the bit.
//   out_in: lhs = grad_output, rhs = rows.   in_out: lhs = rows, rhs = grad_output.
// bgrad: output[e] = sum over the rows of e of grad_output[r].
// fp32, bf16 and fp16 accumulate in fp32, fp64 in fp64. Here K is the contracted width, not top_k.
#pragma once

#include "moe/cuda.h"

namespace moe {

enum class WeightLayout : int8_t { kOutIn, kInOut };

struct GroupedGemmArgs {
  void* output;                   // [R, N] dtype
  const void* rows;               // [R, K] dtype
  const void* weight;             // [E, N, K] or [E, K, N] dtype
  const void* bias;               // [E, N] dtype, or null
  const int32_t* expert_offsets;  // [E + 1]
  int64_t num_rows, num_experts, n, k;
  WeightLayout weight_layout;
  DType dtype;
};

struct GroupedGemmWgradArgs {
  void* output;                   // [E, M, N] dtype
  const void* lhs;                // [R, M] dtype
  const void* rhs;                // [R, N] dtype
  const int32_t* expert_offsets;  // [E + 1]
  int64_t num_rows, num_experts, m, n;
  DType dtype;
  bool accumulate = false;
};

struct GroupedGemmBgradArgs {
  void* output;                   // [E, N] dtype
  const void* grad_output;        // [R, N] dtype
  const int32_t* expert_offsets;  // [E + 1]
  int64_t num_rows, num_experts, n;
  DType dtype;
};

Status grouped_gemm_cpu(const GroupedGemmArgs& args, const ThreadPool& pool);
Status grouped_gemm_cuda(const GroupedGemmArgs& args, const CudaContext& cuda);
Status grouped_gemm_wgrad_cpu(const GroupedGemmWgradArgs& args, const ThreadPool& pool);
Status grouped_gemm_wgrad_cuda(const GroupedGemmWgradArgs& args, const CudaContext& cuda);
Status grouped_gemm_bgrad_cpu(const GroupedGemmBgradArgs& args, const ThreadPool& pool);
Status grouped_gemm_bgrad_cuda(const GroupedGemmBgradArgs& args, const CudaContext& cuda);

}  // namespace moe
