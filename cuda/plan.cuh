// plan, for the operators that sort something else than the slots of tokens.
#pragma once

#include "moe/plan.h"

namespace moe::cuda {

// plan_cuda with num_rows entries in row_to_slot: what belongs to a row past them is left out there, and only there.
Status plan_rows(const PlanArgs& args, int64_t num_rows, const CudaContext& cuda);

}  // namespace moe::cuda
