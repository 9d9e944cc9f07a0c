// ep_index: received rows into what the experts take.
//
// hidden_states[r], topk_weights[r] and ids[r] are read from row r, and the (row, expert) pairs are sorted by expert as
// plan sorts slots: slot r * K + k. Only P rows of the plan are kept: the caller knows how many pairs there are. Were
// there more, those past P would be dropped. hidden_states are one per received row, never one per pair: the experts
// read them through row_to_slot.
#pragma once

#include "moe/cuda.h"
#include "moe/ep_row.h"

namespace moe {

struct EpIndexArgs {
  void* hidden_states;      // [R, H] dtype
  void* topk_weights;       // [R, K] fp32 (fp64 for fp64)
  int32_t* expert_offsets;  // [E + 1]
  int32_t* row_to_slot;     // [P], -1 past the last pair
  int32_t* slot_to_row;     // [R, K]
  const uint8_t* rows;      // [R, row.bytes()]
  EpRow row;
  int64_t num_rows, num_experts;
  int64_t num_pairs;  // P
};

Status ep_index_cpu(const EpIndexArgs& args, const ThreadPool& pool);
Status ep_index_cuda(const EpIndexArgs& args, const CudaContext& cuda);

}  // namespace moe
