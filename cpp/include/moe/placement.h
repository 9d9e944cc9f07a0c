// placement: which rank holds which expert, and which experts are held twice?
//
// A placement gives every rank S places and every place an expert (or none). A busy expert may have several replicas,
// on different ranks, which share its tokens evenly. Of loads l_e and replica counts c_e, the solver lowers the peak
//   max over ranks r of  sum over the experts e on r of  l_e / c_e,
// because all ranks wait for the busiest.
//   1. Hierarchical: with num_groups a multiple of nodes > 1, whole groups of experts go to nodes first, an equal
//   number
//      to each, and each node is solved by itself: a router that limits its groups keeps a token inside few nodes.
//   2. Greedy: each further replica goes to the expert with the most load per replica; replicas, heaviest first, go to
//      the least loaded rank that has room and not the same expert.
//   3. Search: while it lowers the busiest rank, exchange two places, or turn a replica of one expert into one of
//   another.
// With `current` the search also starts from there, and stops as soon as its peak is within (1 + slack) of the fresh
// solution's. Of the two, that with fewer moves is taken, the fresh one after its ranks are renamed to overlap most.
// Layers are independent. The result is a function of the arguments alone: ties go to the lower id.
#pragma once

#include "moe/types.h"

namespace moe {

struct PlacementArgs {
  int32_t* physical_to_logical;  // [L, ep_size, S]; -1: an empty place
  const double* loads;           // [L, E], finite and not negative
  const int32_t* current;        // [L, ep_size, S], anything outside [0, E) is an empty place; or null
  int64_t num_layers, num_experts;
  int64_t ep_size, places_per_rank;  // S; ep_size * S >= num_physical
  int64_t num_physical;              // replicas of all experts, E <= num_physical <= E * (ranks that may hold one)
  int64_t nodes, num_groups;         // nodes divides ep_size, num_groups divides E
  double slack;
  int64_t max_moves;  // experts per layer that may come to a rank anew, only with `current`; -1: no limit
};

// kImpossible where an argument is not as above.
Status placement_cpu(const PlacementArgs& args, const ThreadPool& pool);

}  // namespace moe
