#include "support.h"

#include <algorithm>
#include <limits>
#include <numeric>

namespace moe::test {
namespace {

// K distinct experts of [first, last) for each token.
std::vector<int32_t> draw(int64_t num_tokens, int64_t top_k, int32_t first, int32_t last, int32_t step = 1) {
  std::mt19937 engine(7);
  std::vector<int32_t> experts, ids;
  for (int32_t e = first; e < last; e += step) experts.push_back(e);
  for (int64_t t = 0; t < num_tokens; ++t) {
    std::ranges::shuffle(experts, engine);
    ids.insert(ids.end(), experts.begin(), experts.begin() + top_k);
  }
  return ids;
}

constexpr int32_t kExtremes[] = {-1, std::numeric_limits<int32_t>::min(), std::numeric_limits<int32_t>::max(), -7,
                                 1000};

}  // namespace

std::vector<Problem> problems() {
  std::vector<Problem> all{
      {"no_tokens", 0, 4, 2, 8, 8, {}},
      {"single_token", 1, 4, 2, 8, 8, draw(1, 2, 0, 4)},
      {"empty_expert", 40, 8, 2, 16, 16, draw(40, 2, 0, 8, 2)},
      {"one_expert_takes_all", 50, 4, 1, 32, 24, std::vector<int32_t>(50, 2)},
      {"top_k_equals_num_experts", 9, 6, 6, 8, 8, draw(9, 6, 0, 6)},
      {"many_experts_2048", 30, 2048, 3, 4, 3, draw(30, 3, 0, 2048)},
      {"unaligned", 37, 5, 3, 67, 35, draw(37, 3, 0, 5)},
      {"one_wide", 3, 2, 1, 1, 1, draw(3, 1, 0, 2)},
      {"no_hidden", 4, 3, 2, 0, 5, draw(4, 2, 0, 3)},
      {"no_intermediate", 4, 3, 2, 5, 0, draw(4, 2, 0, 3)},
      {"many_slots", 9000, 3, 2, 3, 2, draw(9000, 2, 0, 3)},
  };
  Problem dropped{"dropped_slots", 21, 5, 3, 31, 7, draw(21, 3, 0, 5)};
  for (size_t i = 0; i < dropped.topk_ids.size(); i += 4) dropped.topk_ids[i] = kExtremes[i / 4 % std::size(kExtremes)];
  all.push_back(dropped);
  return all;
}

Plan sorted_plan(const Problem& problem, int64_t capacity) {
  const int64_t rows = problem.num_rows();
  std::vector<int32_t> slots;
  std::vector<int64_t> kept(problem.num_experts);
  for (int32_t slot = 0; slot < rows; ++slot) {
    const int32_t e = problem.topk_ids[slot];
    if (e < 0 || e >= problem.num_experts || kept[e] == capacity) continue;
    ++kept[e];
    slots.push_back(slot);
  }
  std::ranges::stable_sort(slots, {}, [&](int32_t slot) { return problem.topk_ids[slot]; });
  Plan plan{{0}, slots, std::vector<int32_t>(rows, -1)};
  for (const int64_t n : kept) plan.expert_offsets.push_back(plan.expert_offsets.back() + static_cast<int32_t>(n));
  for (size_t row = 0; row < slots.size(); ++row) plan.slot_to_row[slots[row]] = static_cast<int32_t>(row);
  plan.row_to_slot.resize(rows, -1);
  return plan;
}

Plan garbage_plan(const Problem& problem, uint32_t seed) {
  std::mt19937 engine(seed);
  const auto garbage = [&](int64_t n) {
    std::vector<int32_t> values(n);
    for (int32_t& value : values) {
      const uint32_t draw = engine();
      value = draw % 3 ? static_cast<int32_t>(draw / 8 % (problem.num_rows() + 3))
                       : kExtremes[draw / 8 % std::size(kExtremes)];
    }
    return values;
  };
  return {garbage(problem.num_experts + 1), garbage(problem.num_rows()), garbage(problem.num_rows())};
}

std::vector<int64_t> clamped_offsets(const std::vector<int32_t>& expert_offsets, int64_t rows) {
  std::vector<int64_t> result;
  int64_t previous = 0;
  for (const int32_t offset : expert_offsets) result.push_back(previous = std::clamp<int64_t>(offset, previous, rows));
  return result;
}

int64_t expert_of(const std::vector<int64_t>& offsets, int64_t row) {
  for (size_t e = 0; e + 1 < offsets.size(); ++e) {
    if (offsets[e] <= row && row < offsets[e + 1]) return static_cast<int64_t>(e);
  }
  return -1;
}

}  // namespace moe::test
