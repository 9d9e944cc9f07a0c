#include "moe/grouped_gemm.h"

#include "support.h"

namespace moe::test {
namespace {

template <typename T>
void check_gemm(const std::vector<int32_t>& expert_offsets, int64_t rows, int64_t n, int64_t k, WeightLayout layout,
                bool biased) {
  const int64_t num_experts = static_cast<int64_t>(expert_offsets.size()) - 1;
  const auto input = random_values<T>(rows * k, 1), weight = random_values<T>(num_experts * n * k, 2);
  const auto bias = random_values<T>(num_experts * n, 3);
  const auto [output] = run_on_pools([&](const ThreadPool& pool) {
    auto output = unwritten<T>(rows * n);
    CHECK(grouped_gemm_cpu({output.data(), input.data(), weight.data(), biased ? bias.data() : nullptr,
                            expert_offsets.data(), rows, num_experts, n, k, layout, kDType<T>},
                           pool) == Status::kOk);
    return std::tuple(output);
  });
  const auto offsets = clamped_offsets(expert_offsets, rows);
  for (int64_t i = 0; i < rows * n; ++i) {
    const int64_t row = i / n, j = i % n, e = expert_of(offsets, row);
    Sum sum;
    if (e >= 0) {
      const T* w = weight.data() + e * n * k;
      for (int64_t x = 0; x < k; ++x) {
        sum.add(static_cast<double>(widen(input[row * k + x])) *
                widen(layout == WeightLayout::kOutIn ? w[j * k + x] : w[x * n + j]));
      }
      if (biased) sum.add(widen(bias[e * n + j]));
    }
    CHECK(is_close(output[i], sum));
    if (e < 0) CHECK(widen(output[i]) == 0);
  }
}

template <typename T>
void check_weight_gradients(const std::vector<int32_t>& expert_offsets, int64_t rows, int64_t m, int64_t n) {
  const int64_t num_experts = static_cast<int64_t>(expert_offsets.size()) - 1;
  const auto lhs = random_values<T>(rows * m, 1), rhs = random_values<T>(rows * n, 2);
  const auto [wgrad, added, bgrad] = run_on_pools([&](const ThreadPool& pool) {
    auto wgrad = unwritten<T>(num_experts * m * n), bgrad = unwritten<T>(num_experts * m);
    std::vector<T> added(wgrad.size(), narrow<T>(Wide<T>(0.5)));
    CHECK(grouped_gemm_wgrad_cpu(
              {added.data(), lhs.data(), rhs.data(), expert_offsets.data(), rows, num_experts, m, n, kDType<T>, true},
              pool) == Status::kOk);
    CHECK(grouped_gemm_wgrad_cpu(
              {wgrad.data(), lhs.data(), rhs.data(), expert_offsets.data(), rows, num_experts, m, n, kDType<T>},
              pool) == Status::kOk);
    CHECK(grouped_gemm_bgrad_cpu({bgrad.data(), lhs.data(), expert_offsets.data(), rows, num_experts, m, kDType<T>},
                                 pool) == Status::kOk);
    return std::tuple(wgrad, added, bgrad);
  });
  const auto offsets = clamped_offsets(expert_offsets, rows);
  for (int64_t e = 0; e < num_experts; ++e) {
    for (int64_t i = 0; i < m; ++i) {
      Sum column;
      for (int64_t r = offsets[e]; r < offsets[e + 1]; ++r) column.add(widen(lhs[r * m + i]));
      CHECK(is_close(bgrad[e * m + i], column));
      for (int64_t j = 0; j < n; ++j) {
        Sum sum;
        for (int64_t r = offsets[e]; r < offsets[e + 1]; ++r) {
          sum.add(static_cast<double>(widen(lhs[r * m + i])) * widen(rhs[r * n + j]));
        }
        CHECK(is_close(wgrad[(e * m + i) * n + j], sum));
        if (offsets[e] == offsets[e + 1]) {
          CHECK(widen(wgrad[(e * m + i) * n + j]) == 0);
          CHECK(widen(added[(e * m + i) * n + j]) == Wide<T>(0.5));
        }
        sum.add(0.5);
        CHECK(is_close(added[(e * m + i) * n + j], sum));
      }
    }
  }
}

TEST(grouped_gemm_multiplies_per_expert) {
  for (const Problem& p : problems()) {
    if (p.name == "many_slots") continue;  // nothing new, and slow in a sanitizer
    const Context c(p.name);
    for_each_type([&]<typename T>(std::type_identity<T>) {
      for (const WeightLayout layout : {WeightLayout::kOutIn, WeightLayout::kInOut}) {
        for (const bool biased : {false, true}) {
          check_gemm<T>(sorted_plan(p).expert_offsets, p.num_rows(), p.intermediate_size, p.hidden_size, layout,
                        biased);
        }
      }
      check_weight_gradients<T>(sorted_plan(p).expert_offsets, p.num_rows(), p.intermediate_size, p.hidden_size);
    });
  }
}

// Row counts around the tiles of a kernel, columns and depths around its blocks.
TEST(grouped_gemm_of_any_size) {
  for_each_type([&]<typename T>(std::type_identity<T>) {
    for (const WeightLayout layout : {WeightLayout::kOutIn, WeightLayout::kInOut}) {
      const std::vector<int32_t> offsets{0, 1, 3, 6, 10, 17, 17, 30, 63};
      for (const auto& [n, k] : {std::pair{1, 1}, {7, 3}, {16, 17}, {33, 64}, {65, 5}, {5, 300}, {48, 0}}) {
        const Context c("n " + std::to_string(n) + " k " + std::to_string(k));
        check_gemm<T>(offsets, 70, n, k, layout, true);
        check_weight_gradients<T>(offsets, 70, n, k);
      }
    }
  });
}

// So deep that every kernel takes k in parts, for as few rows as each of them is chosen for.
TEST(grouped_gemm_in_parts_of_k) {
  for_each_type([&]<typename T>(std::type_identity<T>) {
    for (const WeightLayout layout : {WeightLayout::kOutIn, WeightLayout::kInOut}) {
      check_gemm<T>({0, 1, 3, 8, 40, 104}, 104, 9, 4640, layout, false);
      check_gemm<T>({0, 12, 24}, 24, 5, 16960, layout, false);  // twelve rows fill the cache later
    }
  });
}

TEST(grouped_gemm_stays_in_bounds) {
  for (const Problem& p : problems()) {
    if (p.name == "many_slots") continue;
    const Context c(p.name);
    const auto offsets = garbage_plan(p, 9).expert_offsets;
    for (const WeightLayout layout : {WeightLayout::kOutIn, WeightLayout::kInOut}) {
      check_gemm<float>(offsets, p.num_rows(), p.hidden_size, 3, layout, true);
    }
    check_weight_gradients<float>(offsets, p.num_rows(), p.hidden_size, 3);
  }
}

}  // namespace
}  // namespace moe::test
