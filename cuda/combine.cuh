// combine's sum over rows that may lie further apart than they are wide.
#pragma once

#include "moe/plan.h"

namespace moe::cuda {

struct SumTask {
  void* output;              // [T, width] dtype
  const void* rows;          // [R, stride] dtype, of which the first `width` count
  const void* topk_weights;  // [T, K] fp32 (fp64 for fp64), or null: all 1
  PlanView plan;             // only slot_to_row is read
  int64_t width, stride;     // in elements
  DType dtype;
};

Status sum_rows(const SumTask& task, const CudaContext& cuda);

}  // namespace moe::cuda
