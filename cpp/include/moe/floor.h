// floor: what this machine can do at best. A benchmark divides the work of a call by these two numbers: the larger
// quotient is the time that no implementation can beat.
#pragma once

#include "moe/types.h"

namespace moe {

// Floating-point operations per second of fused multiply-adds on registers, all threads together (an FMA is two), the
// best of the rounds that fit in `seconds`. fp32 for kFloat32, kBFloat16 and kFloat16; fp64 for kFloat64.
double fma_rate_cpu(DType dtype, double seconds, const ThreadPool& pool);

// Bytes per second of reading `bytes` of memory in order, all threads together, eight streams per thread (one stream
// reads a fifth less), the best of the rounds that fit in `seconds`. 0 when the memory cannot be had.
double read_bandwidth_cpu(int64_t bytes, double seconds, const ThreadPool& pool);

}  // namespace moe
