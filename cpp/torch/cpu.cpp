// Registers every operator for the CPU.
#include "register_ops.h"
#include "thread_pool.h"

namespace moe {
namespace {

struct Cpu {
  explicit Cpu(const Tensor&) {}
  std::string failure() const { return ""; }

  static Status run(const RouteArgs& args) { return route_cpu(args, kTorchPool); }
  static Status run(const RouteBackwardArgs& args) { return route_backward_cpu(args, kTorchPool); }
  static Status run(const PlanArgs& args) { return plan_cpu(args, kTorchPool); }
  static Status run(const PermuteArgs& args) { return permute_cpu(args, kTorchPool); }
  static Status run(const GroupedGemmArgs& args) { return grouped_gemm_cpu(args, kTorchPool); }
  static Status run(const GroupedGemmWgradArgs& args) { return grouped_gemm_wgrad_cpu(args, kTorchPool); }
  static Status run(const GroupedGemmBgradArgs& args) { return grouped_gemm_bgrad_cpu(args, kTorchPool); }
  static Status run(const ActivationArgs& args) { return activation_cpu(args, kTorchPool); }
  static Status run(const ActivationBackwardArgs& args) { return activation_backward_cpu(args, kTorchPool); }
  static Status run(const CombineArgs& args) { return combine_cpu(args, kTorchPool); }
  static Status run(const CombineBackwardArgs& args) { return combine_backward_cpu(args, kTorchPool); }
  static Status run(const ExpertsArgs& args) { return experts_cpu(args, kTorchPool); }
  static Status run(const RoutedExpertsArgs& args) { return routed_experts_cpu(args, kTorchPool); }
  static Status run(const ExpertsBackwardArgs& args) { return experts_backward_cpu(args, kTorchPool); }
  static Status run(const EpPlanArgs& args) { return ep_plan_cpu(args, kTorchPool); }
  static Status run(const EpPackArgs& args) { return ep_pack_cpu(args, kTorchPool); }
  static Status run(const EpIndexArgs& args) { return ep_index_cpu(args, kTorchPool); }
  static Status run(const EpReduceArgs& args) { return ep_reduce_cpu(args, kTorchPool); }
};

STABLE_TORCH_LIBRARY_IMPL(moe, CPU, m) { register_ops<Cpu>(m); }

}  // namespace
}  // namespace moe
