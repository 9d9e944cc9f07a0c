// Registers every operator for the CPU. What an operator checks and allocates is the same on every device and lives in
// ops/<stage>.h; this file only says which function runs.
#include <torch/csrc/stable/library.h>

#include "ops/activation.h"
#include "ops/combine.h"
#include "ops/ep_index.h"
#include "ops/ep_pack.h"
#include "ops/ep_plan.h"
#include "ops/ep_reduce.h"
#include "ops/experts.h"
#include "ops/grouped_gemm.h"
#include "ops/permute.h"
#include "ops/plan.h"
#include "ops/route.h"
#include "thread_pool.h"

namespace moe {
namespace {

struct Cpu {
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
  static Status run(const ExpertsBackwardArgs& args) { return experts_backward_cpu(args, kTorchPool); }
  static Status run(const EpPlanArgs& args) { return ep_plan_cpu(args, kTorchPool); }
  static Status run(const EpPackArgs& args) { return ep_pack_cpu(args, kTorchPool); }
  static Status run(const EpIndexArgs& args) { return ep_index_cpu(args, kTorchPool); }
  static Status run(const EpReduceArgs& args) { return ep_reduce_cpu(args, kTorchPool); }
};

STABLE_TORCH_LIBRARY_IMPL(moe, CPU, m) {
  m.impl("route", TORCH_BOX(&route<Cpu>));
  m.impl("route_backward", TORCH_BOX(&route_backward<Cpu>));
  m.impl("plan", TORCH_BOX(&plan<Cpu>));
  m.impl("permute", TORCH_BOX(&permute<Cpu>));
  m.impl("grouped_gemm", TORCH_BOX(&grouped_gemm<Cpu>));
  m.impl("grouped_gemm_wgrad", TORCH_BOX(&grouped_gemm_wgrad<Cpu>));
  m.impl("grouped_gemm_wgrad_", TORCH_BOX(&grouped_gemm_wgrad_<Cpu>));
  m.impl("grouped_gemm_bgrad", TORCH_BOX(&grouped_gemm_bgrad<Cpu>));
  m.impl("activation", TORCH_BOX(&activation<Cpu>));
  m.impl("activation_backward", TORCH_BOX(&activation_backward<Cpu>));
  m.impl("combine", TORCH_BOX(&combine<Cpu>));
  m.impl("combine_backward", TORCH_BOX(&combine_backward<Cpu>));
  m.impl("experts", TORCH_BOX(&experts<Cpu>));
  m.impl("experts_backward", TORCH_BOX(&experts_backward<Cpu>));
  m.impl("experts_backward_", TORCH_BOX(&experts_backward_<Cpu>));
  m.impl("ep_plan", TORCH_BOX(&ep_plan<Cpu>));
  m.impl("ep_pack", TORCH_BOX(&ep_pack<Cpu>));
  m.impl("ep_index", TORCH_BOX(&ep_index<Cpu>));
  m.impl("ep_reduce", TORCH_BOX(&ep_reduce<Cpu>));
}

}  // namespace
}  // namespace moe
