// Tensors to PlanArgs, and a plan's three tensors to the PlanView that later stages take.
#pragma once

#include <limits>
#include <optional>
#include <tuple>

#include "checks.h"
#include "moe/plan.h"

namespace moe {

inline Argument check_topk_ids(const Op& op, const Tensor& topk_ids, int64_t num_experts) {
  Argument ids = op.argument("topk_ids", topk_ids).rank(2, "[num_tokens, top_k]").type(ScalarType::Int);
  op.at_least("num_experts", num_experts, 1);
  const int64_t num_slots = ids.size(0) * ids.size(1);
  if (num_slots > std::numeric_limits<int32_t>::max()) {
    ids.fail("have fewer than 2^31 slots", std::to_string(num_slots), "split the batch");
  }
  return ids;
}

template <typename Device>
std::tuple<Tensor, Tensor, Tensor> plan(const Tensor& topk_ids, int64_t num_experts, std::optional<int64_t> capacity) {
  const Op op("plan", topk_ids);
  const Argument ids = check_topk_ids(op, topk_ids, num_experts);
  if (capacity) op.at_least("capacity", *capacity, 0);
  const int64_t num_tokens = ids.size(0), top_k = ids.size(1);
  Tensor expert_offsets = op.empty({num_experts + 1}, ScalarType::Int);
  Tensor row_to_slot = op.empty({num_tokens * top_k}, ScalarType::Int);
  Tensor slot_to_row = op.empty({num_tokens, top_k}, ScalarType::Int);
  op.run<Device>(PlanArgs{.expert_offsets = static_cast<int32_t*>(expert_offsets.mutable_data_ptr()),
                          .row_to_slot = static_cast<int32_t*>(row_to_slot.mutable_data_ptr()),
                          .slot_to_row = static_cast<int32_t*>(slot_to_row.mutable_data_ptr()),
                          .topk_ids = ids.data<int32_t>(),
                          .num_tokens = num_tokens,
                          .num_experts = num_experts,
                          .top_k = top_k,
                          .capacity = capacity.value_or(-1)});
  return {expert_offsets, row_to_slot, slot_to_row};
}

// A plan that the caller does not see, in one tensor; yet to be made, with args().
class InnerPlan {
 public:
  InnerPlan(const Op& op, const Tensor& topk_ids, int64_t num_experts)
      : ids_(check_topk_ids(op, topk_ids, num_experts)),
        num_experts_(num_experts),
        memory_(op.empty({num_experts + 1 + 2 * num_slots()}, ScalarType::Int)) {}

  PlanArgs args() const {
    return {.expert_offsets = offsets(),
            .row_to_slot = rows(),
            .slot_to_row = rows() + num_slots(),
            .topk_ids = ids_.data<int32_t>(),
            .num_tokens = ids_.size(0),
            .num_experts = num_experts_,
            .top_k = ids_.size(1),
            .capacity = -1};
  }

  PlanView view() const {
    return {.expert_offsets = offsets(),
            .row_to_slot = rows(),
            .slot_to_row = rows() + num_slots(),
            .num_tokens = ids_.size(0),
            .num_experts = num_experts_,
            .top_k = ids_.size(1),
            .num_rows = num_slots()};
  }

 private:
  int64_t num_slots() const { return ids_.size(0) * ids_.size(1); }
  int32_t* offsets() const { return static_cast<int32_t*>(memory_.mutable_data_ptr()); }
  int32_t* rows() const { return offsets() + num_experts_ + 1; }

  Argument ids_;
  int64_t num_experts_;
  Tensor memory_;
};

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
