// Registers of a warp, and the order of dependent launches.
#pragma once

#include "ptx/define.cuh"

namespace moe::cuda::ptx {

#if MOE_PTX_SM90
// 9.7.13.13 griddepcontrol: in a launch with overlap_previous, `wait` returns when the kernels before it are done and
// their writes visible; `launch` lets the next such kernel start early. Without that attribute both do nothing.
MOE_DEVICE void grid_dependency_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
MOE_DEVICE void grid_dependency_launch() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
#endif

#if MOE_PTX_SM90A
// 9.7.19.5 setmaxnreg: moves registers between the warpgroups of a block; all warps of a warpgroup call it. dec may not
// raise the number that the warp has, nor inc lower it; inc waits until others have released enough.
template <int kRegisters>
MOE_DEVICE void setmaxnreg_inc() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256, "setmaxnreg takes 24, 32, ... 256");
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
MOE_DEVICE void setmaxnreg_dec() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256, "setmaxnreg takes 24, 32, ... 256");
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
#endif

}  // namespace moe::cuda::ptx
