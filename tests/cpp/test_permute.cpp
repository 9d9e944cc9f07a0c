#include "moe/permute.h"

#include "support.h"

namespace moe::test {
namespace {

template <typename T>
std::vector<T> run_permute(const Problem& p, const Plan& plan, const std::vector<T>& tokens) {
  return std::get<0>(run_on_pools([&](const ThreadPool& pool) {
    auto rows = unwritten<T>(p.num_rows() * p.hidden_size);
    CHECK(permute_cpu({rows.data(), tokens.data(), plan.view(p), p.hidden_size, kDType<T>}, pool) == Status::kOk);
    return std::tuple(rows);
  }));
}

template <typename T>
void check_permute(const Problem& p, const Plan& plan) {
  const auto tokens = random_values<T>(p.num_tokens * p.hidden_size, 1);
  const auto rows = to_double(run_permute(p, plan, tokens)), expected = to_double(tokens);
  for (int64_t row = 0; row < p.num_rows(); ++row) {
    const int64_t slot = plan.row_to_slot[row];
    const bool kept = slot >= 0 && slot < p.num_rows();
    for (int64_t j = 0; j < p.hidden_size; ++j) {
      CHECK(rows[row * p.hidden_size + j] == (kept ? expected[slot / p.top_k * p.hidden_size + j] : 0));
    }
  }
}

TEST(permute_copies_rows) {
  for (const Problem& p : problems()) {
    const Context c(p.name);
    for_each_type([&]<typename T>(std::type_identity<T>) {
      check_permute<T>(p, sorted_plan(p));
      check_permute<T>(p, sorted_plan(p, 2));
    });
  }
}

TEST(permute_stays_in_bounds) {
  for (const Problem& p : problems()) {
    const Context c(p.name);
    check_permute<float>(p, garbage_plan(p, 11));
  }
}

}  // namespace
}  // namespace moe::test
