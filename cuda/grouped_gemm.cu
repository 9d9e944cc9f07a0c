#include "grouped_gemm.cuh"

#include "launch.cuh"
#include "moe/isa.h"

namespace moe::cuda {
namespace {

// Which kernel serves a product: the first row that fits. `row_bytes` divides the bytes of every row of every operand,
// and their addresses.
struct Rule {
  const char* name;
  int first_architecture, last_architecture;
  bool (*takes)(DType dtype, bool allow_tf32);
  int64_t row_bytes;
  int64_t tile_rows;  // the most that tiles may have: tile_rows_for goes by the mean rows of an expert
  Status (*gemm)(const GemmTask& task, const CudaContext& cuda);
  Status (*wgrad)(const WgradTask& task, const CudaContext& cuda);
};

constexpr bool any(DType, bool) { return true; }
constexpr bool is_half(DType dtype, bool) { return dtype == DType::kBFloat16 || dtype == DType::kFloat16; }
constexpr bool is_half_or_tf32(DType dtype, bool allow_tf32) {
  return is_half(dtype, allow_tf32) || (dtype == DType::kFloat32 && allow_tf32);
}

constexpr Rule kRules[] = {
#if defined(MOE_CUDA_SM90) || defined(CUDA_ON_CPU)  // else it was not compiled
    {"sm90_few_rows", 90, 90, is_half, 16, 64, gemm_sm90_few, wgrad_sm90},
    {"sm90_wgmma", 90, 90, is_half, 16, 128, gemm_sm90, wgrad_sm90},
#endif
    {"sm80_mma", 80, 999, is_half_or_tf32, 1, 128, gemm_sm80, wgrad_sm80},
    {"simt", 80, 999, any, 1, 128, gemm_simt, wgrad_simt},
};

// `alignment` is an or of addresses and bytes of rows: its trailing zeros are what they have in common.
const Rule* find_rule(int architecture, DType dtype, int64_t alignment, int64_t tile_rows, bool allow_tf32) {
  for (const Rule& rule : kRules) {
    if (rule.first_architecture <= architecture && architecture <= rule.last_architecture &&
        rule.takes(dtype, allow_tf32) && alignment % rule.row_bytes == 0 && tile_rows <= rule.tile_rows) {
      return &rule;
    }
  }
  return nullptr;
}

template <typename... Pointers>
int64_t alignment_of(DType dtype, int64_t columns, int64_t other_columns, Pointers... pointers) {
  return static_cast<int64_t>((reinterpret_cast<uintptr_t>(pointers) | ...)) |
         (columns | other_columns) * static_cast<int64_t>(size_of(dtype));
}

Status choose(DType dtype, int64_t alignment, int64_t tile_rows, const CudaContext& cuda, const Rule*& rule) {
  int architecture = 0;
  if (const Status status = cuda::architecture(architecture, cuda); status != Status::kOk) return status;
  rule = find_rule(architecture, dtype, alignment, tile_rows, cuda.allow_tf32);
  if (rule == nullptr) return unsupported("grouped_gemm", "needs a GPU of compute capability 8.0 or later", cuda);
  return Status::kOk;
}

}  // namespace

Status gemm(const GemmTask& task, const CudaContext& cuda) {
  if (task.num_rows == 0 || task.n == 0) return Status::kOk;
  // A gate part and an up part of the columns both have to start on a boundary.
  const bool halves = task.epilogue == Epilogue::kActivation && is_gated(task.activation.activation);
  const Rule* rule;
  const int64_t alignment =
      alignment_of(task.dtype, halves ? task.n / 2 : task.n, task.k, task.output, task.rows, task.weight, task.bias,
                   task.pre_activation, task.grad_pre_activation, task.saved_pre_activation);
  const Status status = choose(task.dtype, alignment, task.schedule.tile_rows, cuda, rule);
  return status == Status::kOk ? rule->gemm(task, cuda) : status;
}

Status wgrad(const WgradTask& task, const CudaContext& cuda) {
  if (task.num_experts == 0 || task.m == 0 || task.n == 0) return Status::kOk;
  const Rule* rule;
  const int64_t alignment = alignment_of(task.dtype, task.m, task.n, task.output, task.lhs, task.rhs);
  const Status status = choose(task.dtype, alignment, task.schedule.tile_rows, cuda, rule);
  return status == Status::kOk ? rule->wgrad(task, cuda) : status;
}

}  // namespace moe::cuda

namespace moe {

std::string_view gemm_kernel_name_cuda(int architecture, DType dtype, int64_t rows_per_expert, int64_t n, int64_t k,
                                       bool allow_tf32) {
  const int64_t alignment = (n | k) * static_cast<int64_t>(size_of(dtype));
  const int64_t tile_rows = cuda::tile_rows_for(dtype, rows_per_expert, 1);
  const cuda::Rule* rule = cuda::find_rule(architecture, dtype, alignment, tile_rows, allow_tf32);
  return rule == nullptr ? std::string_view() : rule->name;
}

Status grouped_gemm_cuda(const GroupedGemmArgs& args, const CudaContext& cuda) {
  if (args.num_rows == 0 || args.n == 0) return Status::kOk;
  cuda::GemmTask task{};
  const int64_t tile_rows = cuda::tile_rows_for(args.dtype, args.num_rows, args.num_experts);
  const Status status =
      cuda::make_schedule(args.expert_offsets, args.num_rows, args.num_experts, tile_rows, cuda, &task.schedule);
  if (status != Status::kOk) return status;
  task.output = args.output;
  task.rows = args.rows;
  task.weight = args.weight;
  task.bias = args.bias;
  task.num_rows = args.num_rows;
  task.num_experts = args.num_experts;
  task.n = args.n;
  task.k = args.k;
  task.weight_layout = args.weight_layout;
  task.dtype = args.dtype;
  return cuda::gemm(task, cuda);
}

Status grouped_gemm_wgrad_cuda(const GroupedGemmWgradArgs& args, const CudaContext& cuda) {
  if (args.num_experts == 0 || args.m == 0 || args.n == 0) return Status::kOk;
  cuda::WgradTask task{};
  const Status status =
      cuda::make_schedule(args.expert_offsets, args.num_rows, args.num_experts, 64, cuda, &task.schedule);
  if (status != Status::kOk) return status;
  task.output = args.output;
  task.lhs = args.lhs;
  task.rhs = args.rhs;
  task.num_rows = args.num_rows;
  task.num_experts = args.num_experts;
  task.m = args.m;
  task.n = args.n;
  task.dtype = args.dtype;
  task.accumulate = args.accumulate;
  return cuda::wgrad(task, cuda);
}

}  // namespace moe
