// Tensors to EpPlanArgs.
#pragma once

#include <algorithm>
#include <limits>
#include <optional>
#include <tuple>

#include "checks.h"
#include "moe/ep_plan.h"

namespace moe {

template <typename Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> ep_plan(const Tensor& topk_ids,
                                                           const std::optional<Tensor>& placement, int64_t num_experts,
                                                           int64_t num_local_experts, int64_t ep_size, int64_t ep_rank,
                                                           int64_t num_chunks) {
  const Op op("ep_plan", topk_ids);
  const Argument ids = op.argument("topk_ids", topk_ids).rank(2, "[num_tokens, top_k]").type(ScalarType::Int);
  const int64_t num_tokens = ids.size(0), top_k = ids.size(1);
  op.at_least("num_experts", num_experts, 1);
  op.at_least("num_local_experts", num_local_experts, 1);
  op.at_least("ep_size", ep_size, 1);
  op.at_least("ep_rank", ep_rank, 0);
  op.at_least("num_chunks", num_chunks, 1);
  std::optional<Argument> table;
  if (placement) {
    table = op.argument("placement", *placement).rank(2, "[num_experts, num_replicas]").type(ScalarType::Int);
    table->shape({num_experts, table->size(1)}, "[num_experts, num_replicas]");
  }
  if (num_tokens * std::max(top_k, ep_size) > std::numeric_limits<int32_t>::max()) {
    ids.fail("have fewer than 2^31 slots", std::to_string(num_tokens * std::max(top_k, ep_size)), "split the batch");
  }
  const auto int32 = [&](std::initializer_list<int64_t> shape) { return op.empty(shape, ScalarType::Int); };
  const auto data = [](const Tensor& tensor) { return static_cast<int32_t*>(tensor.mutable_data_ptr()); };
  Tensor physical_ids = int32({num_tokens, top_k});
  Tensor rank_offsets = int32({num_chunks * ep_size + 1});
  Tensor row_to_slot = int32({num_tokens * std::min(top_k, ep_size)});
  Tensor slot_to_row = int32({num_tokens, ep_size});
  Tensor counts = int32({ep_size, 2 * num_chunks + num_local_experts});
  op.run<Device>(EpPlanArgs{.physical_ids = data(physical_ids),
                            .rank_offsets = data(rank_offsets),
                            .row_to_slot = data(row_to_slot),
                            .slot_to_row = data(slot_to_row),
                            .counts = data(counts),
                            .topk_ids = ids.data<int32_t>(),
                            .placement = table ? table->data<int32_t>() : nullptr,
                            .num_tokens = num_tokens,
                            .num_experts = num_experts,
                            .top_k = top_k,
                            .num_replicas = table ? table->size(1) : 1,
                            .ep_size = ep_size,
                            .ep_rank = ep_rank,
                            .num_local_experts = num_local_experts,
                            .num_chunks = num_chunks});
  return {physical_ids, rank_offsets, row_to_slot, slot_to_row, counts};
}

}  // namespace moe
