// Tensors to EpIndexArgs.
#pragma once

#include <limits>
#include <tuple>

#include "moe/ep_index.h"
#include "ops/ep_pack.h"

namespace moe {

template <typename Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> ep_index(const Tensor& rows, const Tensor& like, int64_t hidden_size,
                                                            int64_t top_k, int64_t num_experts, int64_t num_pairs,
                                                            const std::string& wire) {
  const Op op("ep_index", rows);
  op.at_least("hidden_size", hidden_size, 0);
  op.at_least("top_k", top_k, 0);
  op.at_least("num_experts", num_experts, 0);
  op.at_least("num_pairs", num_pairs, 0);
  const EpRow row{.hidden_size = hidden_size,
                  .top_k = top_k,
                  .dtype = dtype_like(op, like),
                  .wire = parse_wire(op, wire),
                  .has_ids = true,
                  .has_weights = true};
  const Argument bytes = check_bytes(op, rows, row);
  const int64_t num_rows = bytes.size(0);
  if (num_rows * top_k > std::numeric_limits<int32_t>::max()) {
    bytes.fail("have fewer than 2^31 slots", std::to_string(num_rows * top_k), "split the batch");
  }
  if (num_pairs > num_rows * top_k) {
    op.fail("num_pairs", "be at most num_rows * top_k = " + std::to_string(num_rows * top_k),
            std::to_string(num_pairs));
  }
  const auto data = [](const Tensor& tensor) { return static_cast<int32_t*>(tensor.mutable_data_ptr()); };
  Tensor hidden_states = op.empty({num_rows, hidden_size}, scalar_type(row.dtype));
  Tensor topk_weights = op.empty({num_rows, top_k}, weight_type(row.dtype));
  Tensor expert_offsets = op.empty({num_experts + 1}, ScalarType::Int);
  Tensor row_to_slot = op.empty({num_pairs}, ScalarType::Int);
  Tensor slot_to_row = op.empty({num_rows, top_k}, ScalarType::Int);
  op.run<Device>(EpIndexArgs{.hidden_states = hidden_states.mutable_data_ptr(),
                             .topk_weights = topk_weights.mutable_data_ptr(),
                             .expert_offsets = data(expert_offsets),
                             .row_to_slot = data(row_to_slot),
                             .slot_to_row = data(slot_to_row),
                             .rows = bytes.data<uint8_t>(),
                             .row = row,
                             .num_rows = num_rows,
                             .num_experts = num_experts,
                             .num_pairs = num_pairs});
  return {hidden_states, topk_weights, expert_offsets, row_to_slot, slot_to_row};
}

}  // namespace moe
