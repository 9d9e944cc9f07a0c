// The tensors of experts_reference.h on the device.
#pragma once

#include "device.h"
#include "experts_reference.h"

namespace moe::test {

// `shift` elements past a boundary.
template <typename T>
struct DeviceLayer {
  const Layer<T>& l;
  size_t shift;
  DeviceArray<T> x{l.x, shift}, w1{l.w1, shift}, w2{l.w2, shift}, b1{l.b1, shift}, b2{l.b2, shift};
  DeviceArray<Wide<T>> s{l.s};
  DeviceArray<T> grad_output{l.grad_output, shift};
  DeviceArray<int32_t> offsets{l.plan.expert_offsets}, row_to_slot{l.plan.row_to_slot}, slot_to_row{l.plan.slot_to_row};

  ExpertsLayer args() const {
    ExpertsLayer args = l.args();
    args.hidden_states = x.data();
    args.gate_up_proj = w1.data();
    args.down_proj = w2.data();
    args.gate_up_bias = l.biased ? b1.data() : nullptr;
    args.down_bias = l.biased ? b2.data() : nullptr;
    args.topk_weights = s.data();
    args.plan.expert_offsets = offsets.data();
    args.plan.row_to_slot = row_to_slot.data();
    args.plan.slot_to_row = slot_to_row.data();
    return args;
  }
};

}  // namespace moe::test
