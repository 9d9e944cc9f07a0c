#include "support.h"

namespace moe::test {
namespace {

Plan run_plan(const Problem& p, int64_t capacity) {
  const auto [offsets, row_to_slot, slot_to_row] = run_on_pools([&](const ThreadPool& pool) {
    auto offsets = unwritten<int32_t>(p.num_experts + 1);
    auto row_to_slot = unwritten<int32_t>(p.num_rows()), slot_to_row = row_to_slot;
    for (int32_t& row : row_to_slot) row = -9;
    for (int32_t& slot : slot_to_row) slot = -9;
    CHECK(plan_cpu({offsets.data(), row_to_slot.data(), slot_to_row.data(), p.topk_ids.data(), p.num_tokens,
                    p.num_experts, p.top_k, capacity},
                   pool) == Status::kOk);
    return std::tuple(offsets, row_to_slot, slot_to_row);
  });
  return {offsets, row_to_slot, slot_to_row};
}

TEST(plan_is_a_stable_sort) {
  for (const Problem& p : problems()) {
    for (const int64_t capacity : {-1, 0, 1, 5, 1 << 30}) {
      const Context c(p.name + " capacity " + std::to_string(capacity));
      const Plan got = run_plan(p, capacity), expected = sorted_plan(p, capacity);
      CHECK(got.expert_offsets == expected.expert_offsets);
      CHECK(got.row_to_slot == expected.row_to_slot);
      CHECK(got.slot_to_row == expected.slot_to_row);
    }
  }
}

// Enough slots that every thread has several chunks' worth.
TEST(plan_of_many_slots) {
  Problem p{"", 40000, 100, 2, 1, 1, {}};
  std::mt19937 engine(1);
  for (int64_t slot = 0; slot < p.num_rows(); ++slot) p.topk_ids.push_back(static_cast<int32_t>(engine() % 103) - 1);
  const Plan got = run_plan(p, -1), expected = sorted_plan(p);
  CHECK(got.row_to_slot == expected.row_to_slot && got.slot_to_row == expected.slot_to_row);
}

}  // namespace
}  // namespace moe::test
