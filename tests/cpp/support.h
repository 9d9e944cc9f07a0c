// Data, thread pools and comparisons that the tests share.
#pragma once

#include <cstring>
#include <random>
#include <thread>
#include <tuple>

#include "check.h"
#include "convert.h"
#include "moe/plan.h"

namespace moe::test {

// A pool with real threads, so that a sanitizer sees what is shared.
template <int kThreads>
constexpr ThreadPool kPool{
    .num_threads = [] { return kThreads; },
    .run =
        [](int64_t count, void (*task)(int64_t, int64_t, void*), void* context) {
          std::vector<std::thread> threads;
          for (int64_t i = 0; i < kThreads; ++i) {
            const int64_t begin = count * i / kThreads, end = count * (i + 1) / kThreads;
            if (begin < end) threads.emplace_back(task, begin, end, context);
          }
          for (std::thread& thread : threads) thread.join();
        },
};

// An output: every byte set, so that an element left unwritten is NaN (or -1) and shows.
template <typename T>
std::vector<T> unwritten(int64_t n) {
  std::vector<T> values(n);
  if (n) std::memset(static_cast<void*>(values.data()), 0xff, n * sizeof(T));
  return values;
}

template <typename T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

// Calls run(pool), which returns a tuple of output vectors, on several pools; all must give the same bits.
template <typename Run>
auto run_on_pools(const Run& run) {
  const auto result = run(kPool<1>);
  const auto same = [&](const auto& other) {
    return [&]<size_t... i>(std::index_sequence<i...>) {
      return (same_bits(std::get<i>(result), std::get<i>(other)) && ...);
    }(std::make_index_sequence<std::tuple_size_v<std::decay_t<decltype(other)>>>{});
  };
  CHECK(same(run(kPool<3>)));
  CHECK(same(run(kPool<7>)));
  return result;
}

// Calls fn(std::type_identity<T>{}) for every element type.
template <typename Fn>
void for_each_type(const Fn& fn) {
  {
    const Context c("fp64");
    fn(std::type_identity<double>{});
  }
  {
    const Context c("fp32");
    fn(std::type_identity<float>{});
  }
  {
    const Context c("bf16");
    fn(std::type_identity<BFloat16>{});
  }
  {
    const Context c("fp16");
    fn(std::type_identity<Float16>{});
  }
}

template <typename T>
constexpr DType kDType = std::is_same_v<T, double>     ? DType::kFloat64
                         : std::is_same_v<T, float>    ? DType::kFloat32
                         : std::is_same_v<T, BFloat16> ? DType::kBFloat16
                                                       : DType::kFloat16;
// Relative rounding error of one operation whose result is stored as T.
template <typename T>
constexpr double kEps = std::is_same_v<T, double>     ? 0x1p-53
                        : std::is_same_v<T, float>    ? 0x1p-24
                        : std::is_same_v<T, BFloat16> ? 0x1p-8
                                                      : 0x1p-11;

// Normally distributed values, rounded to T.
template <typename T>
std::vector<T> random_values(int64_t n, uint32_t seed, double scale = 1) {
  std::mt19937 engine(seed);
  std::normal_distribution<double> normal(0, scale);
  std::vector<T> values(n);
  for (T& value : values) value = narrow<T>(static_cast<Wide<T>>(normal(engine)));
  return values;
}

template <typename T>
std::vector<double> to_double(const std::vector<T>& values) {
  std::vector<double> result;
  for (const T value : values) result.push_back(widen(value));
  return result;
}

// A sum in double, with the sum of the magnitudes, which bounds the rounding error of any order of summation.
struct Sum {
  double value = 0, magnitude = 0;
  int64_t terms = 0;
  void add(double term) {
    value += term;
    magnitude += std::abs(term);
    ++terms;
  }
};

// One stored sum: rounded once to T, its terms to the wide type.
template <typename T>
bool is_close(T got, const Sum& expected) {
  const double bound = kEps<T> * std::abs(expected.value) +
                       static_cast<double>(expected.terms + 4) * kEps<Wide<T>> * expected.magnitude +
                       (sizeof(T) == 2 ? 0x1p-24 : 0);  // fp16 becomes subnormal
  return std::abs(widen(got) - expected.value) <= bound * 1.01;
}

struct Problem {
  std::string name;
  int64_t num_tokens, num_experts, top_k, hidden_size, intermediate_size;
  std::vector<int32_t> topk_ids;  // [T, K]
  int64_t num_rows() const { return num_tokens * top_k; }
};

// The edge shapes, by name.
std::vector<Problem> problems();

// The view of a plan's arrays, wherever they are.
template <typename Arrays>
PlanView view_of(const Arrays& plan, const Problem& p) {
  return {plan.expert_offsets.data(),
          plan.row_to_slot.data(),
          plan.slot_to_row.data(),
          p.num_tokens,
          p.num_experts,
          p.top_k,
          static_cast<int64_t>(plan.row_to_slot.size())};
}

// A plan, made by a stable sort.
struct Plan {
  std::vector<int32_t> expert_offsets, row_to_slot, slot_to_row;
  PlanView view(const Problem& p) const { return view_of(*this, p); }
};
Plan sorted_plan(const Problem& problem, int64_t capacity = -1);
// Maps and offsets that no plan would hold.
Plan garbage_plan(const Problem& problem, uint32_t seed);

// Offsets as every stage reads them: each clamped to [previous, rows].
std::vector<int64_t> clamped_offsets(const std::vector<int32_t>& expert_offsets, int64_t rows);
// The expert of a row, or -1.
int64_t expert_of(const std::vector<int64_t>& offsets, int64_t row);

}  // namespace moe::test
