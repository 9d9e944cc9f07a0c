// permute: put rows of one expert side by side.
//
//   rows[r] = hidden_states[row_to_slot[r] / K];  a row without a slot (row_to_slot = -1) is zero.
// Its gradient is combine without weights.
#pragma once

#include "moe/plan.h"

namespace moe {

struct PermuteArgs {
  void* rows;                 // [R, H] dtype
  const void* hidden_states;  // [T, H] dtype
  PlanView plan;
  int64_t hidden_size;
  DType dtype;
};

Status permute_cpu(const PermuteArgs& args, const ThreadPool& pool);
Status permute_cuda(const PermuteArgs& args, const CudaContext& cuda);

}  // namespace moe
