// The layer's forward by two kernels where there are few slots (experts_sm90_few.cu): for experts.cu and explain().
#pragma once

#include "moe/experts.h"

namespace moe::cuda {

constexpr int64_t kMostFewSlots = 256;        // a thread has one
constexpr int64_t kMostExperts = UINT16_MAX;  // of those kernels

// topk_ids: [T, K], of which args.layer.plan tells the sizes alone.
Status experts_sm90_few(const ExpertsArgs& args, const int32_t* topk_ids, const CudaContext& cuda);

}  // namespace moe::cuda
