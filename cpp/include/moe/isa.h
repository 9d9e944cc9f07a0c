// isa: which instruction set and which kernel the CPU operators run on. The choice is made once, when the library is
// loaded: MOE_ISA in the environment, else the best that the processor has.
#pragma once

#include <string_view>
#include <vector>

#include "moe/grouped_gemm.h"

namespace moe {

std::string_view isa_name();
// Every instruction set that was compiled and that the processor has, best first.
std::vector<std::string_view> available_isas();
// For tests: false, and nothing changes, when there is no such instruction set here.
bool set_isa(std::string_view name);

// How a grouped GEMM treats an expert with this many rows.
std::string_view gemm_kernel_name(WeightLayout layout, int64_t rows, DType dtype);

// Which kernel a grouped GEMM [R, K] x [N, K] runs on a GPU of compute capability architecture / 10, its operands being
// 16-byte aligned and its experts having this many rows on average; empty: none. Only in a build with CUDA; needs no
// GPU.
std::string_view gemm_kernel_name_cuda(int architecture, DType dtype, int64_t rows_per_expert, int64_t n, int64_t k,
                                       bool allow_tf32);

// Of how many slots (T * K) at most routed_experts makes no plan and takes two kernels on such a GPU, where rows start
// on 16 bytes; 0: of none.
int64_t most_few_slots_cuda(int architecture, DType dtype);

}  // namespace moe
