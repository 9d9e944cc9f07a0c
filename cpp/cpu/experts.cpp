// The stages one after another, with their intermediate results in scratch memory.
#include "moe/experts.h"

#include <vector>

#include "convert.h"
#include "moe/combine.h"
#include "moe/permute.h"
#include "parallel.h"
#include "plan_view.h"
#include "reduce.h"

namespace moe {
namespace {

using Bytes = Scratch<char>;

// The sizes, and the stages with the layer's weights.
struct Stages {
  const ExpertsLayer& layer;
  const ThreadPool& pool;
  int64_t rows = num_rows(layer.plan), hidden = layer.hidden_size, inner = layer.intermediate_size,
          pre = pre_activation_size(layer.activation.activation, layer.intermediate_size);

  Bytes buffer(int64_t width) const { return Bytes(rows * width * static_cast<int64_t>(size_of(layer.dtype)) + 1); }
  Status permute(const void* tokens, void* output) const {
    return permute_cpu({output, tokens, layer.plan, hidden, layer.dtype}, pool);
  }
  Status gemm(void* output, const void* input, const void* weight, const void* bias, int64_t n, int64_t k,
              WeightLayout layout) const {
    return grouped_gemm_cpu({output, input, weight, bias, layer.plan.expert_offsets, rows, layer.plan.num_experts, n, k,
                             layout, layer.dtype},
                            pool);
  }
  // The weight gradient in the weight's layout: `out` is the gradient at the output side, `in` the input.
  Status wgrad(void* output, const void* out, int64_t out_width, const void* in, int64_t in_width) const {
    const bool out_in = layer.weight_layout == WeightLayout::kOutIn;
    return grouped_gemm_wgrad_cpu(
        {output, out_in ? out : in, out_in ? in : out, layer.plan.expert_offsets, rows, layer.plan.num_experts,
         out_in ? out_width : in_width, out_in ? in_width : out_width, layer.dtype},
        pool);
  }
  Status bgrad(void* output, const void* grad, int64_t width) const {
    return grouped_gemm_bgrad_cpu(
        {output, grad, layer.plan.expert_offsets, rows, layer.plan.num_experts, width, layer.dtype}, pool);
  }
  WeightLayout other_layout() const {
    return layer.weight_layout == WeightLayout::kOutIn ? WeightLayout::kInOut : WeightLayout::kOutIn;
  }
  Status pre_activation(void* output) const {
    const Bytes gathered = buffer(hidden);
    if (!gathered) return Status::kOutOfMemory;
    if (const Status s = permute(layer.hidden_states, gathered.get()); s != Status::kOk) return s;
    return gemm(output, gathered.get(), layer.gate_up_proj, layer.gate_up_bias, pre, hidden, layer.weight_layout);
  }
};

Status first_failure(std::initializer_list<Status> all) {
  for (const Status s : all) {
    if (s != Status::kOk) return s;
  }
  return Status::kOk;
}

}  // namespace

Status experts_cpu(const ExpertsArgs& args, const ThreadPool& pool) {
  const Stages stages{args.layer, pool};
  const ExpertsLayer& layer = args.layer;
  const Bytes h = stages.buffer(args.pre_activation ? 0 : stages.pre), a = stages.buffer(stages.inner),
              y = stages.buffer(stages.hidden);
  if (!h || !a || !y) return Status::kOutOfMemory;
  void* pre = args.pre_activation ? args.pre_activation : h.get();
  return first_failure(
      {stages.pre_activation(pre),
       activation_cpu({a.get(), pre, stages.rows, stages.inner, layer.dtype, layer.activation}, pool),
       stages.gemm(y.get(), a.get(), layer.down_proj, layer.down_bias, stages.hidden, stages.inner,
                   layer.weight_layout),
       combine_cpu({args.output, y.get(), layer.topk_weights, layer.plan, stages.hidden, layer.dtype}, pool)});
}

Status experts_backward_cpu(const ExpertsBackwardArgs& args, const ThreadPool& pool) {
  const Stages stages{args.layer, pool};
  const ExpertsLayer& layer = args.layer;
  const int64_t hidden = stages.hidden, inner = stages.inner, pre_width = stages.pre, rows = stages.rows;
  const Bytes h = stages.buffer(args.pre_activation ? 0 : pre_width), a = stages.buffer(inner),
              y = stages.buffer(hidden), grad_y = stages.buffer(hidden), grad_a = stages.buffer(inner),
              grad_h = stages.buffer(pre_width), x = stages.buffer(hidden);
  const Scratch<double> weights(rows + 1);  // large enough for either type
  if (!h || !a || !y || !grad_y || !grad_a || !grad_h || !x || !weights) return Status::kOutOfMemory;
  void* pre = h.get();
  Status status = Status::kOk;
  if (!args.pre_activation) status = stages.pre_activation(h.get());
  const void* saved = args.pre_activation ? args.pre_activation : pre;
  void* grad_weights = args.grad_topk_weights ? args.grad_topk_weights : weights.get();
  status = first_failure(
      {status, activation_cpu({a.get(), saved, rows, inner, layer.dtype, layer.activation}, pool),
       stages.gemm(y.get(), a.get(), layer.down_proj, layer.down_bias, hidden, inner, layer.weight_layout),
       combine_backward_cpu(
           {grad_y.get(), grad_weights, args.grad_output, y.get(), layer.topk_weights, layer.plan, hidden, layer.dtype},
           pool),
       stages.gemm(grad_a.get(), grad_y.get(), layer.down_proj, nullptr, inner, hidden, stages.other_layout()),
       activation_backward_cpu({grad_h.get(), grad_a.get(), saved, rows, inner, layer.dtype, layer.activation}, pool),
       stages.permute(layer.hidden_states, x.get())});
  if (status != Status::kOk) return status;
  if (args.grad_down_proj) status = stages.wgrad(args.grad_down_proj, grad_y.get(), hidden, a.get(), inner);
  if (status == Status::kOk && args.grad_gate_up_proj) {
    status = stages.wgrad(args.grad_gate_up_proj, grad_h.get(), pre_width, x.get(), hidden);
  }
  if (status == Status::kOk && args.grad_down_bias) status = stages.bgrad(args.grad_down_bias, grad_y.get(), hidden);
  if (status == Status::kOk && args.grad_gate_up_bias) {
    status = stages.bgrad(args.grad_gate_up_bias, grad_h.get(), pre_width);
  }
  if (status != Status::kOk || !args.grad_hidden_states) return status;
  return first_failure(
      {stages.gemm(x.get(), grad_h.get(), layer.gate_up_proj, nullptr, hidden, pre_width, stages.other_layout()),
       combine_cpu({args.grad_hidden_states, x.get(), nullptr, layer.plan, hidden, layer.dtype}, pool)});
}

}  // namespace moe
