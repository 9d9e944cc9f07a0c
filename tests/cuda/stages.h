// What the tests of the stages' kernels share besides device.h.
#pragma once

#include <algorithm>

#include "device.h"
#include "support.h"

namespace moe::test {

// A plan in device memory.
struct DevicePlan {
  explicit DevicePlan(const Plan& plan)
      : expert_offsets(plan.expert_offsets), row_to_slot(plan.row_to_slot), slot_to_row(plan.slot_to_row) {}
  PlanView view(const Problem& p) const {
    return {expert_offsets.data(), row_to_slot.data(), slot_to_row.data(), p.num_tokens, p.num_experts, p.top_k,
            p.num_rows()};
  }
  DeviceArray<int32_t> expert_offsets, row_to_slot, slot_to_row;
};

// Offsets as every stage reads them: each clamped to [previous, rows].
inline std::vector<int64_t> clamped_offsets(const Plan& plan, int64_t rows) {
  std::vector<int64_t> offsets;
  for (const int32_t offset : plan.expert_offsets) {
    offsets.push_back(std::clamp<int64_t>(offset, offsets.empty() ? 0 : offsets.back(), rows));
  }
  return offsets;
}

// A result that is rounded once to T after some arithmetic in the wide type, whose error is at most `units` of its
// rounding errors at the given magnitude. bf16 and fp16 have fast exponentials.
template <typename T>
bool agrees(T got, double expected, double magnitude, double units) {
  const double result = widen(got);
  if (!std::isfinite(expected)) return std::isnan(expected) ? std::isnan(result) : result == expected;
  const double bound =
      kEps<T> * std::abs(expected) + units * kEps<Wide<T>> * magnitude + (sizeof(T) == 2 ? 0x1p-24 : 0);
  return std::abs(result - expected) <= bound * 1.01;
}

// The problems, small enough for the emulator.
inline std::vector<Problem> small_problems() {
  std::vector<Problem> all = problems();
  for (Problem& p : all) {
    p.num_tokens = std::min<int64_t>(p.num_tokens, 600);
    p.topk_ids.resize(static_cast<size_t>(p.num_rows()));
  }
  return all;
}

}  // namespace moe::test
