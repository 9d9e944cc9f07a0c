// Builds the routing kernels of one instruction set from the templates beside this file.
#pragma once

#include "route/backward.h"
#include "route/forward.h"

namespace moe::MOE_ISA {

template <typename Storage>
const RouteKernels<Storage>& route_table() {
  static constexpr RouteKernels<Storage> kTable = {.forward = forward<Storage>, .backward = backward<Storage>};
  return kTable;
}

template const RouteKernels<float>& route_table<float>();
template const RouteKernels<BFloat16>& route_table<BFloat16>();
template const RouteKernels<Float16>& route_table<Float16>();
template const RouteKernels<double>& route_table<double>();

}  // namespace moe::MOE_ISA
