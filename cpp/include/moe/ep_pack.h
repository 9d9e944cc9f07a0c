// ep_pack: tokens into the rows that are sent.
//
// Row r carries token t = row_to_slot[r] / W for rank d = row_to_slot[r] mod W: the token in the wire type; the local
// expert ids, physical_ids[t, k] - d * L where that lies in [0, L), else -1; and the weights topk_weights[t, k].
// Without maps row r carries token r and no ids. A row without a slot carries zeros, and ids of -1.
#pragma once

#include "moe/cuda.h"
#include "moe/ep_row.h"

namespace moe {

struct EpPackArgs {
  uint8_t* rows;                // [R, row.bytes()]
  const void* hidden_states;    // [T, H] dtype
  const void* topk_weights;     // [T, K] fp32 (fp64 for fp64); null unless row.has_weights
  const int32_t* physical_ids;  // [T, K]; null unless row.has_ids
  const int32_t* row_to_slot;   // [R], or null
  EpRow row;
  int64_t num_rows, num_tokens;
  int64_t ep_size, num_local_experts;  // W, L
};

Status ep_pack_cpu(const EpPackArgs& args, const ThreadPool& pool);
Status ep_pack_cuda(const EpPackArgs& args, const CudaContext& cuda);

}  // namespace moe
