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
  PlanView view(const Problem& p) const { return view_of(*this, p); }
  DeviceArray<int32_t> expert_offsets, row_to_slot, slot_to_row;
};

// The plan with its first rows alone, fewer than slots. Half a plan points past them, as a user's may.
inline Plan first_rows(Plan plan, int64_t rows) {
  plan.row_to_slot.resize(static_cast<size_t>(rows));
  return plan;
}
inline Plan kept_rows(const Plan& plan) { return first_rows(plan, plan.expert_offsets.back()); }
inline Plan half_of(const Plan& plan) { return first_rows(plan, static_cast<int64_t>(plan.row_to_slot.size()) / 2); }

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
  constexpr int64_t kMostExperts = 300;
  std::vector<Problem> all = problems();
  for (Problem& p : all) {
    p.num_tokens = std::min<int64_t>(p.num_tokens, 600);
    p.topk_ids.resize(static_cast<size_t>(p.num_rows()));
    if (p.num_experts <= kMostExperts) continue;
    p.num_experts = kMostExperts;
    for (int32_t& id : p.topk_ids) id %= kMostExperts;
  }
  return all;
}

}  // namespace moe::test
