#include "stages.h"

namespace moe::test {
namespace {

Plan run_plan(const Problem& p, int64_t capacity) {
  DeviceArray<int32_t> ids(p.topk_ids), offsets(p.num_experts + 1), row_to_slot(p.num_rows()),
      slot_to_row(p.num_rows());
  cudaMemset(row_to_slot.data(), 0x77, static_cast<size_t>(p.num_rows()) * 4);  // not -1, which is a result
  cudaMemset(slot_to_row.data(), 0x77, static_cast<size_t>(p.num_rows()) * 4);
  const WrittenOnce once(offsets), once_row(row_to_slot), once_slot(slot_to_row);
  run_on_device([&](const CudaContext& device) {
    return plan_cuda({offsets.data(), row_to_slot.data(), slot_to_row.data(), ids.data(), p.num_tokens, p.num_experts,
                      p.top_k, capacity},
                     device);
  });
  return {offsets.host(), row_to_slot.host(), slot_to_row.host()};
}

void check_plan(const Problem& p, int64_t capacity) {
  const Context c(p.name + " capacity " + std::to_string(capacity));
  const Plan got = run_plan(p, capacity), expected = sorted_plan(p, capacity);
  CHECK(got.expert_offsets == expected.expert_offsets);
  CHECK(got.row_to_slot == expected.row_to_slot);
  CHECK(got.slot_to_row == expected.slot_to_row);
}

// Ids of [-1, num_experts + 1), so some belong to no expert.
Problem random_problem(int64_t num_tokens, int64_t num_experts, int64_t top_k, uint32_t seed, bool skewed = false) {
  Problem p{std::to_string(num_tokens) + " tokens", num_tokens, num_experts, top_k, 1, 1, {}};
  std::mt19937 engine(seed);
  for (int64_t slot = 0; slot < p.num_rows(); ++slot) {
    const auto id = static_cast<int32_t>(engine() % static_cast<uint32_t>(num_experts + 2)) - 1;
    p.topk_ids.push_back(skewed && engine() % 4 ? 0 : id);
  }
  return p;
}

TEST(plan_is_a_stable_sort) {
  for (const Problem& p : small_problems()) {
    for (const int64_t capacity : {-1, 0, 1, 5, 1 << 30}) check_plan(p, capacity);
  }
}

// Several blocks, several steps of a warp, a last block that is not full.
TEST(plan_of_several_blocks) {
  for (const bool skewed : {false, true}) {
    for (const int64_t capacity : {-1, 100}) check_plan(random_problem(2600, 7, 2, 1, skewed), capacity);
  }
}

// Counters that shared memory holds for few warps only, and not at all.
TEST(plan_of_many_experts) {
  // First, as a kernel keeps what it once asked for: 48 KB less a little, beside arrays.
  check_plan(random_problem(1500, 355, 1, 6), -1);
  check_plan(random_problem(70, 4096, 2, 2), -1);
  check_plan(random_problem(20000, 2048, 1, 4), 9);
  check_plan(random_problem(50, 30000, 2, 3), -1);
}

TEST(plan_of_many_experts_in_several_blocks) { check_plan(random_problem(41000, 10000, 3, 5), -1); }

// The definition, on its own: maps that are inverse, ascending slots inside an expert, offsets that add up.
TEST(plan_has_its_properties) {
  for (uint32_t seed = 0; seed < 6; ++seed) {
    const Problem p = random_problem(1 + 37 * seed * seed, 1 + 5 * seed, 1 + seed % 4, seed);
    const Context c("seed " + std::to_string(seed));
    const int64_t capacity = seed % 2 ? 7 : -1;
    const Plan plan = run_plan(p, capacity);
    CHECK(plan.expert_offsets.front() == 0);
    int64_t dropped = 0;
    for (int64_t slot = 0; slot < p.num_rows(); ++slot) {
      const int32_t row = plan.slot_to_row[slot], e = p.topk_ids[slot];
      if (row < 0) {
        ++dropped;
        continue;
      }
      if (!CHECK(row < p.num_rows() && e >= 0 && e < p.num_experts)) continue;
      CHECK(plan.row_to_slot[row] == slot);
      CHECK(row >= plan.expert_offsets[e] && row < plan.expert_offsets[e + 1]);
      if (row > plan.expert_offsets[e]) CHECK(plan.row_to_slot[row - 1] < slot);
    }
    CHECK(plan.expert_offsets.back() == p.num_rows() - dropped);
    for (int64_t row = plan.expert_offsets.back(); row < p.num_rows(); ++row) CHECK(plan.row_to_slot[row] == -1);
    for (int64_t e = 0; e < p.num_experts && capacity >= 0; ++e) {
      CHECK(plan.expert_offsets[e + 1] - plan.expert_offsets[e] <= capacity);
    }
  }
}

}  // namespace
}  // namespace moe::test
