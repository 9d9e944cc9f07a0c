// The avx512 table, for the instruction sets whose tables are that one with a few other entries.
#pragma once

#include "gemm/kernels.h"

namespace moe::avx512 {

template <typename Storage>
const Kernels<Storage>& table();
extern template const Kernels<float>& table<float>();
extern template const Kernels<BFloat16>& table<BFloat16>();
extern template const Kernels<Float16>& table<Float16>();
extern template const Kernels<double>& table<double>();

}  // namespace moe::avx512
