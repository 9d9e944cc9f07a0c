// ep_plan: which token goes to which rank?
//
// Rank d owns the physical experts [d * L, (d + 1) * L). A token goes to a rank once, however many of its experts are
// there. Rows are the tokens' copies, ordered by (chunk, rank, token); chunk c is the tokens [T * c / C, T * (c + 1) /
// C).
//   p[t, k] = placement[topk_ids[t, k], (t + rank) mod (its number of replicas)]  -1 for an id outside [0, E), an
//   expert
//             without replicas, and a physical expert outside [0, W * L). Without a placement p = id.
//   Rows of chunk c for rank d: [rank_offsets[c * W + d], rank_offsets[c * W + d + 1]).
//   A slot is a (token, rank) pair, numbered t * W + d: row_to_slot, slot_to_row and rank_offsets are the maps of a
//   plan with K = W, so that permute gathers the rows and combine sums them, in the order of the ranks. counts[d]: rows
//   for d by chunk [C], then (token, expert) pairs for d by chunk [C], then pairs by expert of d [L].
// A counting sort: the result does not depend on the number of threads.
#pragma once

#include "moe/cuda.h"

namespace moe {

struct EpPlanArgs {
  int32_t* physical_ids;     // [T, K]
  int32_t* rank_offsets;     // [C * W + 1]
  int32_t* row_to_slot;      // [T * min(K, W)], -1 past the last row
  int32_t* slot_to_row;      // [T, W], -1: the token does not go there
  int32_t* counts;           // [W, 2 * C + L]
  const int32_t* topk_ids;   // [T, K]
  const int32_t* placement;  // [E, N] physical experts, the replicas first, then -1; or null
  int64_t num_tokens, num_experts, top_k;
  int64_t num_replicas;       // N, at most of one expert
  int64_t ep_size, ep_rank;   // W, and which of them this is
  int64_t num_local_experts;  // L
  int64_t num_chunks;         // C
};

Status ep_plan_cpu(const EpPlanArgs& args, const ThreadPool& pool);
Status ep_plan_cuda(const EpPlanArgs& args, const CudaContext& cuda);

}  // namespace moe
