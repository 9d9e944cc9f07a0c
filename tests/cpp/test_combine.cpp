#include "moe/combine.h"

#include "support.h"

namespace moe::test {
namespace {

int64_t in_range(int64_t index, int64_t n) { return index >= 0 && index < n ? index : -1; }

template <typename T>
void check_combine(const Problem& p, const Plan& plan, bool weighted) {
  using W = Wide<T>;
  const int64_t h = p.hidden_size, k = p.top_k;
  const auto rows = random_values<T>(p.num_rows() * h, 1);
  const auto weights = random_values<W>(p.num_rows(), 2);
  const auto [output] = run_on_pools([&](const ThreadPool& pool) {
    auto output = unwritten<T>(p.num_tokens * h);
    CHECK(combine_cpu({output.data(), rows.data(), weighted ? weights.data() : nullptr, plan.view(p), h, kDType<T>},
                      pool) == Status::kOk);
    return std::tuple(output);
  });
  for (int64_t i = 0; i < p.num_tokens * h; ++i) {
    Sum sum;
    for (int64_t slot = i / h * k; slot < (i / h + 1) * k; ++slot) {
      const int64_t row = in_range(plan.slot_to_row[slot], p.num_rows());
      if (row >= 0) sum.add((weighted ? weights[slot] : 1.0) * widen(rows[row * h + i % h]));
    }
    CHECK(is_close(output[i], sum));
  }
}

template <typename T>
void check_backward(const Problem& p, const Plan& plan) {
  using W = Wide<T>;
  const int64_t h = p.hidden_size, k = p.top_k;
  const auto rows = random_values<T>(p.num_rows() * h, 1), grad = random_values<T>(p.num_tokens * h, 3);
  const auto weights = random_values<W>(p.num_rows(), 2);
  const auto [grad_rows, grad_weights] = run_on_pools([&](const ThreadPool& pool) {
    auto grad_rows = unwritten<T>(p.num_rows() * h);
    auto grad_weights = unwritten<W>(p.num_rows());
    CHECK(combine_backward_cpu({grad_rows.data(), grad_weights.data(), grad.data(), rows.data(), weights.data(),
                                plan.view(p), h, kDType<T>},
                               pool) == Status::kOk);
    return std::tuple(grad_rows, grad_weights);
  });
  for (int64_t i = 0; i < p.num_rows() * h; ++i) {
    const int64_t slot = in_range(plan.row_to_slot[i / h], p.num_rows());
    Sum sum;
    if (slot >= 0) sum.add(static_cast<double>(weights[slot]) * widen(grad[slot / k * h + i % h]));
    CHECK(is_close(grad_rows[i], sum));
  }
  for (int64_t slot = 0; slot < p.num_rows(); ++slot) {
    const int64_t row = in_range(plan.slot_to_row[slot], p.num_rows());
    Sum sum;
    for (int64_t j = 0; row >= 0 && j < h; ++j) {
      sum.add(static_cast<double>(widen(rows[row * h + j])) * widen(grad[slot / k * h + j]));
    }
    CHECK(is_close(grad_weights[slot], sum));
  }
}

TEST(combine_sums_rows) {
  for (const Problem& p : problems()) {
    const Context c(p.name);
    for_each_type([&]<typename T>(std::type_identity<T>) {
      for (const Plan& plan : {sorted_plan(p), sorted_plan(p, 2)}) {
        check_combine<T>(p, plan, true);
        check_combine<T>(p, plan, false);
        check_backward<T>(p, plan);
      }
    });
  }
}

TEST(combine_of_wide_rows) {
  Problem p{"wide", 3, 2, 1, 1500, 1, {0, 1, 0}};
  check_combine<float>(p, sorted_plan(p), true);
  check_backward<float>(p, sorted_plan(p));
}

TEST(combine_stays_in_bounds) {
  for (const Problem& p : problems()) {
    const Context c(p.name);
    check_combine<float>(p, garbage_plan(p, 5), true);
    check_backward<float>(p, garbage_plan(p, 6));
  }
}

}  // namespace
}  // namespace moe::test
