// What one instruction set offers to the route operator, and the scratch memory it needs.
#pragma once

#include "convert.h"
#include "moe/route.h"

namespace moe {

// Rows in scratch memory are padded to whole vectors of the widest kind (sixteen floats), and one more can be read.
constexpr int64_t kRoutePad = 16;
constexpr int64_t route_padded(int64_t n) { return (n + kRoutePad - 1) / kRoutePad * kRoutePad; }

// One thread's scratch memory: rows of `stride` elements. K may exceed E when a caller's ids repeat.
template <typename Real>
struct RouteWorkspace {
  Real *logits, *scores, *choice, *group_scores, *weights, *grads;
  int32_t *picks, *order, *groups;

  static constexpr int64_t kRealRows = 6, kIntRows = 3;
  static constexpr int64_t stride(int64_t num_experts, int64_t top_k) {
    return route_padded(num_experts > top_k ? num_experts : top_k) + kRoutePad;
  }
  static RouteWorkspace of_chunk(int64_t chunk, int64_t stride, Real* reals, int32_t* ints) {
    Real* r = reals + chunk * kRealRows * stride;
    int32_t* i = ints + chunk * kIntRows * stride;
    return {r, r + stride, r + 2 * stride, r + 3 * stride, r + 4 * stride, r + 5 * stride,
            i, i + stride, i + 2 * stride};
  }
};

template <typename Storage>
struct RouteKernels {
  using Workspace = RouteWorkspace<Wide<Storage>>;

  // Tokens [begin, end). Returns false when a logit is not finite and args.options.check_finite asks.
  bool (*forward)(const RouteArgs& args, int64_t begin, int64_t end, const Workspace& work);
  void (*backward)(const RouteBackwardArgs& args, int64_t begin, int64_t end, const Workspace& work);
};

// Those of the instruction set in use (moe/isa.h).
template <typename Storage>
const RouteKernels<Storage>& route_kernels();

}  // namespace moe
