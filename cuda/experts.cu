// The layer on a GPU: every product is a GemmTask or a WgradTask, so that each architecture's kernels serve it. Saved
// between forward and backward are X, H, the weights of the slots, and the plan (formulas: moe/experts.h).
#include "moe/experts.h"

#include <utility>

#include "experts_few.h"
#include "grouped_gemm.cuh"
#include "launch.cuh"
#include "moe/combine.h"
#include "moe/isa.h"

#define MOE_RETURN_IF_ERROR(expression) \
  if (const Status status = (expression); status != Status::kOk) return status

namespace moe {
namespace cuda {
namespace {

constexpr WeightLayout transposed(WeightLayout layout) {
  return layout == WeightLayout::kOutIn ? WeightLayout::kInOut : WeightLayout::kOutIn;
}

// The sizes of a layer, and tasks with what all products of a call have in common.
struct Layer {
  const ExpertsLayer& args;
  const CudaContext& cuda;
  int64_t rows = args.plan.num_rows, experts = args.plan.num_experts;
  int64_t hidden = args.hidden_size, intermediate = args.intermediate_size;
  int64_t width = pre_activation_size(args.activation.activation, intermediate);
  TileSchedule schedule{};

  Status make_schedule() {
    // Few rows have a kernel of their own, which adds in another order: who asks for the same bits gets that for many.
    const int64_t counted = args.row_invariant ? INT64_MAX : rows;
    return cuda::make_schedule(args.plan.expert_offsets, rows, experts, tile_rows_for(args.dtype, counted, experts),
                               cuda, &schedule);
  }
  // Uninitialised scratch of R rows.
  Status allocate(void*& scratch, int64_t columns, size_t element_bytes) const {
    scratch = cuda::allocate<char>(rows * columns * static_cast<int64_t>(element_bytes), cuda);
    return scratch == nullptr ? Status::kOutOfMemory : Status::kOk;
  }
  Gather by_token() const { return {args.plan.row_to_slot, args.plan.num_tokens * args.plan.top_k, args.plan.top_k}; }

  GemmTask gemm_task(const void* weight, WeightLayout layout, int64_t n, int64_t k) const {
    GemmTask task{};
    task.weight = weight;
    task.weight_layout = layout;
    task.n = n;
    task.k = k;
    task.schedule = schedule;
    task.num_rows = rows;
    task.num_experts = experts;
    task.dtype = args.dtype;
    task.activation = args.activation;
    return task;
  }
  // H and act(H), either of which may be null.
  Status gate_up(void* pre_activation, void* activated) const {
    GemmTask task = gemm_task(args.gate_up_proj, args.weight_layout, width, hidden);
    task.output = activated;
    task.pre_activation = pre_activation;
    task.rows = args.hidden_states;
    task.gather = by_token();
    task.bias = args.gate_up_bias;
    task.epilogue = Epilogue::kActivation;
    return gemm(task, cuda);
  }
  // output[t] = sum over its rows, weighted or not, of rows[r].
  Status combine(void* output, const void* rows_of_slots, const void* topk_weights) const {
    return combine_cuda({output, rows_of_slots, topk_weights, args.plan, hidden, args.dtype}, cuda);
  }
  // The gradient of a weight that maps `in` to `out`: the sum of out_rows in_rows^T.
  Status weight_grad(void* output, const void* out_rows, Gather out_gather, int64_t out, const void* in_rows,
                     Gather in_gather, int64_t in, bool accumulate) const {
    WgradTask task{output, out_rows, out_gather, in_rows, in_gather,  schedule,
                   rows,   experts,  out,        in,      args.dtype, accumulate};
    if (args.weight_layout == WeightLayout::kInOut) {
      std::swap(task.lhs, task.rhs);
      std::swap(task.lhs_gather, task.rhs_gather);
      std::swap(task.m, task.n);
    }
    return wgrad(task, cuda);
  }
};

Status forward(const ExpertsArgs& args, const CudaContext& cuda) {
  Layer layer{args.layer, cuda};
  const size_t bytes = size_of(args.layer.dtype);
  void *activated, *down;
  MOE_RETURN_IF_ERROR(layer.make_schedule());
  MOE_RETURN_IF_ERROR(layer.allocate(activated, layer.intermediate, bytes));
  MOE_RETURN_IF_ERROR(layer.allocate(down, layer.hidden, bytes));
  MOE_RETURN_IF_ERROR(layer.gate_up(args.pre_activation, activated));
  GemmTask task = layer.gemm_task(args.layer.down_proj, args.layer.weight_layout, layer.hidden, layer.intermediate);
  task.output = down;
  task.rows = activated;
  task.bias = args.layer.down_bias;
  MOE_RETURN_IF_ERROR(gemm(task, cuda));
  return layer.combine(args.output, down, args.layer.topk_weights);
}

Status backward(const ExpertsBackwardArgs& args, const CudaContext& cuda) {
  const ExpertsLayer& l = args.layer;
  Layer layer{l, cuda};
  const size_t bytes = size_of(l.dtype), weight_bytes = l.dtype == DType::kFloat64 ? 8 : 4;
  const int64_t partials = gemm_partials(layer.intermediate);
  const bool needs_dh = args.grad_hidden_states || args.grad_gate_up_proj || args.grad_gate_up_bias;
  MOE_RETURN_IF_ERROR(layer.make_schedule());

  // 1. H, again if it was not saved; then dH takes its place.
  const void* pre_activation = args.pre_activation;
  void *grad_pre_activation = nullptr, *scaled = nullptr, *parts = nullptr;
  const bool needs_h = needs_dh || args.grad_down_proj || args.grad_topk_weights;
  if (needs_dh || (needs_h && pre_activation == nullptr)) {
    MOE_RETURN_IF_ERROR(layer.allocate(grad_pre_activation, layer.width, bytes));
  }
  if (needs_h && pre_activation == nullptr) {
    MOE_RETURN_IF_ERROR(layer.gate_up(grad_pre_activation, nullptr));
    pre_activation = grad_pre_activation;
  }

  // 2. dH, s act(H) and the parts of ds.
  if (needs_h) {
    if (args.grad_down_proj) MOE_RETURN_IF_ERROR(layer.allocate(scaled, layer.intermediate, bytes));
    if (args.grad_topk_weights) MOE_RETURN_IF_ERROR(layer.allocate(parts, partials, weight_bytes));
    GemmTask task = layer.gemm_task(l.down_proj, transposed(l.weight_layout), layer.intermediate, layer.hidden);
    task.output = scaled;
    task.grad_pre_activation = needs_dh ? grad_pre_activation : nullptr;
    task.partial_grad_weights = parts;
    task.rows = args.grad_output;
    task.gather = layer.by_token();
    task.saved_pre_activation = pre_activation;
    task.row_weights = l.topk_weights;
    task.epilogue = Epilogue::kActivationBackward;
    MOE_RETURN_IF_ERROR(gemm(task, cuda));
  }
  if (args.grad_topk_weights) {
    MOE_RETURN_IF_ERROR(reduce_grad_weights({args.grad_topk_weights, parts, args.grad_output, l.down_bias, l.plan,
                                             layer.schedule, partials, layer.hidden, l.dtype},
                                            cuda));
  }

  // 3. dW2 = sum dO (s act(H))^T.
  if (args.grad_down_proj) {
    MOE_RETURN_IF_ERROR(layer.weight_grad(args.grad_down_proj, args.grad_output, layer.by_token(), layer.hidden, scaled,
                                          {}, layer.intermediate, args.accumulate));
  }

  // 4. dX = sum over its rows of W1^T dH.
  if (args.grad_hidden_states) {
    void* grad_rows;
    MOE_RETURN_IF_ERROR(layer.allocate(grad_rows, layer.hidden, bytes));
    GemmTask task = layer.gemm_task(l.gate_up_proj, transposed(l.weight_layout), layer.hidden, layer.width);
    task.output = grad_rows;
    task.rows = grad_pre_activation;
    MOE_RETURN_IF_ERROR(gemm(task, cuda));
    MOE_RETURN_IF_ERROR(layer.combine(args.grad_hidden_states, grad_rows, nullptr));
  }

  // 5. dW1 = sum dH X^T, and the bias gradients.
  if (args.grad_gate_up_proj) {
    MOE_RETURN_IF_ERROR(layer.weight_grad(args.grad_gate_up_proj, grad_pre_activation, {}, layer.width, l.hidden_states,
                                          layer.by_token(), layer.hidden, args.accumulate));
  }
  const auto bias_grad = [&](void* output, const void* rows, Gather gather, const void* row_weights, int64_t n) {
    return output == nullptr
               ? Status::kOk
               : bgrad({output, rows, gather, row_weights, layer.schedule, layer.rows, layer.experts, n, l.dtype},
                       cuda);
  };
  MOE_RETURN_IF_ERROR(bias_grad(args.grad_gate_up_bias, grad_pre_activation, {}, nullptr, layer.width));
  return bias_grad(args.grad_down_bias, args.grad_output, layer.by_token(), l.topk_weights, layer.hidden);
}

// Whether the kernels for few slots take a forward: by sizes and addresses, so that the choice needs nothing from the
// device. They add in an order of their own, and keep nothing for a backward.
bool takes_few_slots(const ExpertsArgs& args, int architecture) {
  const ExpertsLayer& l = args.layer;
  const int64_t slots = l.plan.num_tokens * l.plan.top_k;
  uintptr_t alignment = 0;
  for (const void* p : {l.hidden_states, l.gate_up_proj, l.down_proj, l.gate_up_bias, l.down_bias,
                        static_cast<const void*>(args.output)}) {
    alignment |= reinterpret_cast<uintptr_t>(p);
  }
  alignment |= static_cast<uintptr_t>((l.hidden_size | l.intermediate_size) * static_cast<int64_t>(size_of(l.dtype)));
  return 1 <= slots && slots <= most_few_slots_cuda(architecture, l.dtype) && l.plan.num_experts <= kMostExperts &&
         l.hidden_size > 0 && l.intermediate_size > 0 && alignment % 16 == 0 && !l.row_invariant &&
         args.pre_activation == nullptr;
}

}  // namespace
}  // namespace cuda

int64_t most_few_slots_cuda(int architecture, DType dtype) {
#if defined(MOE_CUDA_SM90) || defined(CUDA_ON_CPU)  // else they were not compiled
  const bool half = dtype == DType::kBFloat16 || dtype == DType::kFloat16;
  return architecture == 90 && half ? cuda::kMostFewSlots : 0;
#else
  static_cast<void>(architecture), static_cast<void>(dtype);
  return 0;
#endif
}

Status routed_experts_cuda(const RoutedExpertsArgs& args, const CudaContext& cuda) {
#if defined(MOE_CUDA_SM90) || defined(CUDA_ON_CPU)
  int architecture = 0;
  MOE_RETURN_IF_ERROR(cuda::architecture(architecture, cuda));
  if (cuda::takes_few_slots(args.experts, architecture)) {
    return cuda::experts_sm90_few(args.experts, args.plan.topk_ids, cuda);
  }
#endif
  MOE_RETURN_IF_ERROR(plan_cuda(args.plan, cuda));
  return experts_cuda(args.experts, cuda);
}

Status experts_cuda(const ExpertsArgs& args, const CudaContext& cuda) { return cuda::forward(args, cuda); }

Status experts_backward_cuda(const ExpertsBackwardArgs& args, const CudaContext& cuda) {
  return cuda::backward(args, cuda);
}

}  // namespace moe
