// Tensors to PlanArgs, and a plan's three tensors to the PlanView that later stages take.
#pragma once

#include <limits>
#include <optional>
#include <tuple>

#include "checks.h"
#include "moe/plan.h"

namespace moe {

// A plan that is checked and allocated, and yet to be made by running `args`.
struct NewPlan {
  Argument topk_ids;
  Tensor expert_offsets, row_to_slot, slot_to_row;
  PlanArgs args;
};

inline NewPlan new_plan(const Op& op, const Tensor& topk_ids, int64_t num_experts, std::optional<int64_t> capacity) {
  const Argument ids = op.argument("topk_ids", topk_ids).rank(2, "[num_tokens, top_k]").type(ScalarType::Int);
  const int64_t num_tokens = ids.size(0), top_k = ids.size(1);
  op.at_least("num_experts", num_experts, 1);
  if (capacity) op.at_least("capacity", *capacity, 0);
  if (num_tokens * top_k > std::numeric_limits<int32_t>::max()) {
    ids.fail("have fewer than 2^31 slots", std::to_string(num_tokens * top_k), "split the batch");
  }
  Tensor expert_offsets = op.empty({num_experts + 1}, ScalarType::Int);
  Tensor row_to_slot = op.empty({num_tokens * top_k}, ScalarType::Int);
  Tensor slot_to_row = op.empty({num_tokens, top_k}, ScalarType::Int);
  const PlanArgs args{.expert_offsets = static_cast<int32_t*>(expert_offsets.mutable_data_ptr()),
                      .row_to_slot = static_cast<int32_t*>(row_to_slot.mutable_data_ptr()),
                      .slot_to_row = static_cast<int32_t*>(slot_to_row.mutable_data_ptr()),
                      .topk_ids = ids.data<int32_t>(),
                      .num_tokens = num_tokens,
                      .num_experts = num_experts,
                      .top_k = top_k,
                      .capacity = capacity.value_or(-1)};
  return {ids, expert_offsets, row_to_slot, slot_to_row, args};
}

template <typename Device>
std::tuple<Tensor, Tensor, Tensor> plan(const Tensor& topk_ids, int64_t num_experts, std::optional<int64_t> capacity) {
  const Op op("plan", topk_ids);
  const NewPlan plan = new_plan(op, topk_ids, num_experts, capacity);
  op.run<Device>(plan.args);
  return {plan.expert_offsets, plan.row_to_slot, plan.slot_to_row};
}

inline Argument check_offsets(const Op& op, const Tensor& expert_offsets) {
  const Argument offsets =
      op.argument("expert_offsets", expert_offsets).rank(1, "[num_experts + 1]").type(ScalarType::Int);
  if (offsets.size(0) < 1) offsets.fail("have num_experts + 1 elements", "none", "it starts with 0");
  return offsets;
}

// The checked tensors of a plan, kept alive while their view is in use.
struct PlanTensors {
  Argument expert_offsets, row_to_slot, slot_to_row;

  PlanTensors(const Op& op, const Tensor& offsets, const Tensor& rows, const Tensor& slots)
      : expert_offsets(check_offsets(op, offsets)),
        row_to_slot(op.argument("row_to_slot", rows).type(ScalarType::Int)),
        slot_to_row(op.argument("slot_to_row", slots).rank(2, "[num_tokens, top_k]").type(ScalarType::Int)) {
    if (row_to_slot.rank(1, "[num_rows]").size(0) > num_tokens() * top_k()) {
      row_to_slot.fail("have at most num_tokens * top_k = " + std::to_string(num_tokens() * top_k()) + " rows",
                       std::to_string(num_rows()));
    }
  }

  int64_t num_tokens() const { return slot_to_row.size(0); }
  int64_t top_k() const { return slot_to_row.size(1); }
  int64_t num_rows() const { return row_to_slot.size(0); }
  int64_t num_experts() const { return expert_offsets.size(0) - 1; }
  PlanView view() const {
    return {.expert_offsets = expert_offsets.data<int32_t>(),
            .row_to_slot = row_to_slot.data<int32_t>(),
            .slot_to_row = slot_to_row.data<int32_t>(),
            .num_tokens = num_tokens(),
            .num_experts = num_experts(),
            .top_k = top_k(),
            .num_rows = num_rows()};
  }
};

}  // namespace moe
