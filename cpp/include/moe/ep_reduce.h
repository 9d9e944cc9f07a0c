// ep_reduce: returned rows into tokens.
//
//   output[t] = sum over the ranks d, ascending, of row slot_to_row[t, d], accumulated in fp32 (fp64 for fp64)
//   weights[t, k] = weight k of row slot_to_row[t, p / L] with p = physical_ids[t, k]; 0 without one
// What a rank returns for a token is already summed over its experts, so a token has one row per rank.
#pragma once

#include "moe/cuda.h"
#include "moe/ep_row.h"

namespace moe {

struct EpReduceArgs {
  void* output;                 // [T, H] dtype
  void* weights;                // [T, K] fp32 (fp64 for fp64); null unless row.has_weights
  const uint8_t* rows;          // [R, row.bytes()]
  const int32_t* slot_to_row;   // [T, W]
  const int32_t* physical_ids;  // [T, K]; null unless row.has_weights
  EpRow row;
  int64_t num_rows, num_tokens;
  int64_t ep_size, num_local_experts;  // W, L
};

Status ep_reduce_cpu(const EpReduceArgs& args, const ThreadPool& pool);
Status ep_reduce_cuda(const EpReduceArgs& args, const CudaContext& cuda);

}  // namespace moe
