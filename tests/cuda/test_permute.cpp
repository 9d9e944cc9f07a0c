#include "moe/permute.h"

#include "stages.h"

namespace moe::test {
namespace {

template <typename T>
void check_permute(const Problem& p, const Plan& plan, int64_t offset) {
  const auto tokens = random_values<T>(p.num_tokens * p.hidden_size, 1);
  const int64_t num_rows = std::ssize(plan.row_to_slot);
  std::vector<T> expected(static_cast<size_t>(num_rows * p.hidden_size), T{});
  for (int64_t row = 0; row < num_rows; ++row) {
    const int64_t slot = plan.row_to_slot[row];
    if (slot < 0 || slot >= p.num_rows()) continue;
    const auto token = tokens.begin() + slot / p.top_k * p.hidden_size;
    std::copy_n(token, p.hidden_size, expected.begin() + row * p.hidden_size);
  }
  DevicePlan maps(plan);
  DeviceArray<T> in(tokens, offset), rows(num_rows * p.hidden_size, offset);
  const WrittenOnce once(rows);
  run_on_device([&](const CudaContext& device) {
    return permute_cuda({rows.data(), in.data(), maps.view(p), p.hidden_size, kDType<T>}, device);
  });
  CHECK(same_bits(rows.host(), expected));
}

TEST(permute_copies_rows) {
  for (const Problem& p : small_problems()) {
    const Context c(p.name);
    for_each_type([&]<typename T>(std::type_identity<T>) {
      for (const int64_t offset : {0, 1}) {
        check_permute<T>(p, sorted_plan(p), offset);
        check_permute<T>(p, sorted_plan(p, 2), offset);
      }
      check_permute<T>(p, kept_rows(sorted_plan(p, 2)), 0);
      check_permute<T>(p, half_of(sorted_plan(p)), 0);
      for (uint32_t seed = 0; seed < 2; ++seed) check_permute<T>(p, garbage_plan(p, seed), 0);
    });
  }
}

// Several blocks along a row.
TEST(permute_copies_wide_rows) {
  const Problem p{"wide", 3, 2, 2, 9000, 1, {0, 1, 1, 0, 0, 1}};
  check_permute<BFloat16>(p, sorted_plan(p), 0);
  check_permute<BFloat16>(p, sorted_plan(p), 1);
}

}  // namespace
}  // namespace moe::test
