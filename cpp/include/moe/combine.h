// combine: weighted sum back to tokens.
//
//   output[t] = sum over k of topk_weights[t, k] * rows[slot_to_row[t, k]], k ascending, dropped slots left out.
// Without weights every weight is 1: the gradient of permute.
//
// combine_backward: grad_rows[r] = w(r) * grad_output[t(r)], zero for a row without a slot;
//   grad_topk_weights[t, k] = <rows[slot_to_row[t, k]], grad_output[t]>, 0 for a dropped slot.
#pragma once

#include "moe/plan.h"

namespace moe {

struct CombineArgs {
  void* output;              // [T, H] dtype
  const void* rows;          // [R, H] dtype
  const void* topk_weights;  // [T, K] fp32 (fp64 for fp64 rows), or null: all ones
  PlanView plan;
  int64_t hidden_size;
  DType dtype;
};

struct CombineBackwardArgs {
  void* grad_rows;           // [R, H] dtype
  void* grad_topk_weights;   // [T, K] fp32 (fp64 for fp64 rows)
  const void* grad_output;   // [T, H] dtype
  const void* rows;          // [R, H] dtype
  const void* topk_weights;  // [T, K] fp32 (fp64 for fp64 rows)
  PlanView plan;
  int64_t hidden_size;
  DType dtype;
};

Status combine_cpu(const CombineArgs& args, const ThreadPool& pool);
Status combine_cuda(const CombineArgs& args, const CudaContext& cuda);
Status combine_backward_cpu(const CombineBackwardArgs& args, const ThreadPool& pool);
Status combine_backward_cuda(const CombineBackwardArgs& args, const CudaContext& cuda);

}  // namespace moe
