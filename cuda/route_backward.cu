// route_backward: a warp has a token. It writes the whole row of gradients as if no expert had been selected, and then
// those of the selected ones.
#include "route.cuh"

namespace moe::cuda {
namespace {

constexpr int kWarpsPerBlock = 8;

template <typename T>
__global__ void __launch_bounds__(32 * kWarpsPerBlock, 2)
    route_backward_kernel(T* grad_logits, const Wide<T>* grad_topk_weights, const T* router_logits,
                          const int32_t* topk_ids, int64_t num_tokens, int num_experts, int top_k,
                          RouteRule<Wide<T>> rule) {
  using Real = Wide<T>;
  const int lane = threadIdx.x % 32;
  const int64_t token = int64_t{blockIdx.x} * kWarpsPerBlock + threadIdx.x / 32;
  if (token >= num_tokens) return;
  grad_logits += token * num_experts;
  router_logits += token * num_experts;
  topk_ids += token * top_k;
  grad_topk_weights += token * top_k;

  // 1. The selection: its weights before renormalisation, and their gradients.
  Softmax<Real> softmax;
  if (rule.over_all()) {
    Real largest = kNone<Real>, sum = 0;
#pragma unroll 4
    for (int e = lane; e < num_experts; e += 32) largest = larger(largest, widen(router_logits[e]));
    softmax.largest = warp_max(largest);
#pragma unroll 4
    for (int e = lane; e < num_experts; e += 32) sum += softmax.exponent(widen(router_logits[e]));
    softmax.scale = 1 / warp_sum(sum);
  }
  const auto ids = [topk_ids](int j) { return topk_ids[j]; };
  const Selection<T, decltype(ids)> selection(rule, router_logits, num_experts, top_k, ids, softmax);
  const auto dot = [&](const auto& grad) {
    Real sum = 0;
    selection.for_each([&](int j) { sum += selection.valid(j) ? grad(j) * selection.weight(j) : Real{0}; });
    return warp_sum(sum);
  };

  // 2. Through the renormalisation.
  const auto scaled = [&](int j) { return grad_topk_weights[j] * rule.scale; };
  const auto norm = selection.norm();
  const Real shared = norm.clamped ? Real{0} : dot(scaled) / norm.divisor;
  const auto normed = [&](int j) {
    if (!rule.renormalize) return scaled(j);
    const Real along = rule.p == 1 || norm.clamped ? Real{1} : pow(selection.weight(j) / norm.length, rule.p - 1);
    return (scaled(j) - shared * along) / norm.divisor;
  };

  // 3. Through the scores.
  const Real mean = rule.is_softmax() ? dot(normed) : Real{0};
  const auto unselected = [&](int e) { return rule.over_all() ? -mean * softmax(widen(router_logits[e])) : Real{0}; };
#pragma unroll 4
  for (int e = lane; e < num_experts; e += 32) grad_logits[e] = narrow<T>(unselected(e));
  if (!MOE_BUG(route, 8)) __syncwarp();
  const auto selected = [&](int j) {
    const Real g = normed(j), w = selection.weight(j);
    if (!rule.is_softmax()) return g * score_slope(rule, selection.logit(j), w);
    return w * (rule.over_all() ? g : g - mean);
  };
  selection.for_each([&](int j) {
    if (!selection.valid(j)) return;
    // Ids may be repeated: the first adds up all.
    const int32_t id = selection.id(j);
    Real sum = selected(j);
    for (int i = 0; i < top_k; ++i) {
      if (i == j || topk_ids[i] != id) continue;
      if (i < j) return;
      sum += selected(i);
    }
    grad_logits[id] = narrow<T>(unselected(id) + sum);
  });
}

}  // namespace
}  // namespace moe::cuda

namespace moe {

using namespace cuda;

Status route_backward_cuda(const RouteBackwardArgs& args, const CudaContext& cuda) {
  if (args.num_tokens == 0 || args.num_experts == 0) return Status::kOk;
  return with_type(args.dtype, [&]<typename T>(std::type_identity<T>) {
    LAUNCH(route_backward_kernel<T>, dim3(static_cast<unsigned>(ceil_div(args.num_tokens, kWarpsPerBlock))),
           dim3(32 * kWarpsPerBlock), 0, stream(cuda), static_cast<T*>(args.grad_router_logits),
           static_cast<const Wide<T>*>(args.grad_topk_weights), static_cast<const T*>(args.router_logits),
           args.topk_ids, args.num_tokens, static_cast<int>(args.num_experts), static_cast<int>(args.top_k),
           RouteRule<Wide<T>>(args.options));
    return launched("route_backward", cuda);
  });
}

}  // namespace moe
