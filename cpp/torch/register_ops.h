// The operators of a device. What an operator checks and allocates is the same on every device and lives in
// ops/<stage>.h; a Device only says which function runs:
//   Device(first tensor)    Status run(args), for each stage's args    std::string failure(), after a status not kOk
#pragma once

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

namespace moe {

template <typename Device, typename Library>
void register_ops(Library& m) {
  m.impl("route", TORCH_BOX(&route<Device>));
  m.impl("route_backward", TORCH_BOX(&route_backward<Device>));
  m.impl("plan", TORCH_BOX(&plan<Device>));
  m.impl("permute", TORCH_BOX(&permute<Device>));
  m.impl("grouped_gemm", TORCH_BOX(&grouped_gemm<Device>));
  m.impl("grouped_gemm_wgrad", TORCH_BOX(&grouped_gemm_wgrad<Device>));
  m.impl("grouped_gemm_wgrad_", TORCH_BOX(&grouped_gemm_wgrad_<Device>));
  m.impl("grouped_gemm_bgrad", TORCH_BOX(&grouped_gemm_bgrad<Device>));
  m.impl("activation", TORCH_BOX(&activation<Device>));
  m.impl("activation_backward", TORCH_BOX(&activation_backward<Device>));
  m.impl("combine", TORCH_BOX(&combine<Device>));
  m.impl("combine_backward", TORCH_BOX(&combine_backward<Device>));
  m.impl("experts", TORCH_BOX(&experts<Device>));
  m.impl("routed_experts", TORCH_BOX(&routed_experts<Device>));
  m.impl("experts_backward", TORCH_BOX(&experts_backward<Device>));
  m.impl("experts_backward_", TORCH_BOX(&experts_backward_<Device>));
  m.impl("ep_plan", TORCH_BOX(&ep_plan<Device>));
  m.impl("ep_pack", TORCH_BOX(&ep_pack<Device>));
  m.impl("ep_index", TORCH_BOX(&ep_index<Device>));
  m.impl("ep_reduce", TORCH_BOX(&ep_reduce<Device>));
}

}  // namespace moe
