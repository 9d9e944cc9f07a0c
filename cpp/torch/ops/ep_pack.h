// Tensors to EpPackArgs, and the row format that ep_index and ep_reduce read again.
#pragma once

#include <optional>

#include "checks.h"
#include "moe/ep_pack.h"

namespace moe {

inline Wire parse_wire(const Op& op, const std::string& wire) {
  return op.parse<Wire>("wire", wire, {{"input", Wire::kInput}, {"fp8", Wire::kFp8}, {"int8", Wire::kInt8}});
}

// The dtype of tokens, by a tensor of it.
inline DType dtype_like(const Op& op, const Tensor& like) { return op.argument("like", like).floating().dtype(); }

inline Argument check_bytes(const Op& op, const Tensor& rows, const EpRow& row) {
  const Argument bytes = op.argument("rows", rows).rank(2, "[num_rows, row_bytes]").type(ScalarType::Byte);
  return bytes.shape({bytes.size(0), row.bytes()}, "[num_rows, row_bytes]");
}

template <typename Device>
Tensor ep_pack(const Tensor& hidden_states, const std::optional<Tensor>& topk_weights,
               const std::optional<Tensor>& physical_ids, const std::optional<Tensor>& row_to_slot, int64_t ep_size,
               int64_t num_local_experts, const std::string& wire) {
  const Op op("ep_pack", hidden_states);
  const Argument tokens = op.argument("hidden_states", hidden_states).rank(2, "[num_tokens, hidden_size]").floating();
  const int64_t num_tokens = tokens.size(0);
  op.at_least("ep_size", ep_size, 1);
  op.at_least("num_local_experts", num_local_experts, 1);
  std::optional<Argument> weights, ids, slots;
  int64_t top_k = 0;
  if (topk_weights) {
    weights = op.argument("topk_weights", *topk_weights).rank(2, "[num_tokens, top_k]");
    top_k = weights->size(1);
    weights->shape({num_tokens, top_k}, "[num_tokens, top_k]").type(weight_type(tokens.dtype()));
  }
  if (physical_ids) {
    if (!weights) op.fail("topk_weights", "be given with physical_ids", "None");
    ids = op.argument("physical_ids", *physical_ids).shape({num_tokens, top_k}, "[num_tokens, top_k]");
    ids->type(ScalarType::Int);
  }
  if (row_to_slot) slots = op.argument("row_to_slot", *row_to_slot).rank(1, "[num_rows]").type(ScalarType::Int);
  const EpRow row{.hidden_size = tokens.size(1),
                  .top_k = top_k,
                  .dtype = tokens.dtype(),
                  .wire = parse_wire(op, wire),
                  .has_ids = ids.has_value(),
                  .has_weights = weights.has_value()};
  const int64_t num_rows = slots ? slots->size(0) : num_tokens;
  Tensor rows = op.empty({num_rows, row.bytes()}, ScalarType::Byte);
  op.run<Device>(EpPackArgs{.rows = static_cast<uint8_t*>(rows.mutable_data_ptr()),
                            .hidden_states = tokens.data(),
                            .topk_weights = weights ? weights->data() : nullptr,
                            .physical_ids = ids ? ids->data<int32_t>() : nullptr,
                            .row_to_slot = slots ? slots->data<int32_t>() : nullptr,
                            .row = row,
                            .num_rows = num_rows,
                            .num_tokens = num_tokens,
                            .ep_size = ep_size,
                            .num_local_experts = num_local_experts});
  return rows;
}

}  // namespace moe
