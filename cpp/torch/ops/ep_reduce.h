// Tensors to EpReduceArgs.
#pragma once

#include <optional>
#include <tuple>

#include "moe/ep_reduce.h"
#include "ops/ep_pack.h"

namespace moe {

template <typename Device>
std::tuple<Tensor, Tensor> ep_reduce(const Tensor& rows, const Tensor& like, const Tensor& slot_to_row,
                                     const std::optional<Tensor>& physical_ids, int64_t hidden_size,
                                     int64_t num_local_experts) {
  const Op op("ep_reduce", rows);
  op.at_least("hidden_size", hidden_size, 0);
  op.at_least("num_local_experts", num_local_experts, 1);
  const Argument slots = op.argument("slot_to_row", slot_to_row).rank(2, "[num_tokens, ep_size]").type(ScalarType::Int);
  const int64_t num_tokens = slots.size(0);
  std::optional<Argument> ids;
  int64_t top_k = 0;
  if (physical_ids) {
    ids = op.argument("physical_ids", *physical_ids).rank(2, "[num_tokens, top_k]").type(ScalarType::Int);
    top_k = ids->size(1);
    ids->shape({num_tokens, top_k}, "[num_tokens, top_k]");
  }
  const EpRow row{.hidden_size = hidden_size,
                  .top_k = top_k,
                  .dtype = dtype_like(op, like),
                  .wire = Wire::kInput,
                  .has_ids = false,
                  .has_weights = ids.has_value()};
  const Argument bytes = check_bytes(op, rows, row);
  Tensor output = op.empty({num_tokens, hidden_size}, scalar_type(row.dtype));
  Tensor weights = op.empty({num_tokens, top_k}, weight_type(row.dtype));
  op.run<Device>(EpReduceArgs{.output = output.mutable_data_ptr(),
                              .weights = ids ? weights.mutable_data_ptr() : nullptr,
                              .rows = bytes.data<uint8_t>(),
                              .slot_to_row = slots.data<int32_t>(),
                              .physical_ids = ids ? ids->data<int32_t>() : nullptr,
                              .row = row,
                              .num_rows = bytes.size(0),
                              .num_tokens = num_tokens,
                              .ep_size = slots.size(1),
                              .num_local_experts = num_local_experts});
  return {output, weights};
}

}  // namespace moe
