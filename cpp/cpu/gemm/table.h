// Builds the tables of one instruction set from the templates beside this file.
#pragma once

#include <limits>

#include "gemm/activate.h"
#include "gemm/dot.h"
#include "gemm/dot_fours.h"
#include "gemm/dot_stream.h"
#include "gemm/kernels.h"
#include "gemm/outer.h"
#include "gemm/pack.h"
#include "gemm/rows.h"

namespace moe::MOE_ISA {

template <typename Storage>
const Kernels<Storage>& table() {
  using Real = Wide<Storage>;
  static constexpr Kernels<Storage> kTable = {
      .lanes = kLanes<Real>,
      .narrow_lanes = kNarrowLanes<Real>,
      .accumulators = MOE_ACCUMULATORS,
      .tile_vectors = MOE_TILE_VECTORS,
      // benchmarks/bench_grouped_gemm.py shows both sides.
      .most_fours_rows = kMostFoursRows<Real>,
      .most_in_place_rows = MOE_ACCUMULATORS >= 24 ? std::numeric_limits<int>::max() : 16,
      .dot_step = kDotStep<Storage>,
      .dot_width = kDotParts<Storage> * kLanes<Real>,
      .outer = outer<Real, false>,
      .dot = dot<Storage>,
      .dot_fours = dot_fours<Real, false>,
      .pack_fours = pack_fours<Real>,
      .arrange_for_dot = arrange_for_dot<Storage>,
      .pack_transposed = pack_transposed<Storage>,
      .pack_reals_transposed = pack_transposed<Real>,
      .pack = pack<Storage>,
      .transpose = transpose<Real>,
      .widen_row = widen_row<Storage>,
      .narrow_row = narrow_row<Storage>,
      .stream_row = stream_row<Storage>,
      .finish_streams = finish_streams,
      .axpy = axpy<Real>,
      .dot_row = dot_row<Real>,
      .activate = activate<Real>,
      .activate_backward = activate_backward<Real>,
      .scale = scale<Real>,
      .fma_rounds = fma_rounds<Real>,
      .read_streams = read_streams<Real>,
  };
  return kTable;
}

template const Kernels<float>& table<float>();
template const Kernels<BFloat16>& table<BFloat16>();
template const Kernels<Float16>& table<Float16>();
template const Kernels<double>& table<double>();

}  // namespace moe::MOE_ISA
