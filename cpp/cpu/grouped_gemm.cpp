#include "moe/grouped_gemm.h"

#include "convert.h"
#include "parallel.h"
#include "plan_view.h"

namespace moe {
namespace {

// Multiplications that are worth a thread.
constexpr int64_t kWorkGrain = 1 << 15;

int64_t grain(int64_t work_per_item) { return ceil_div(kWorkGrain, std::max<int64_t>(work_per_item, 1)); }

}  // namespace

Status grouped_gemm_cpu(const GroupedGemmArgs& args, const ThreadPool& pool) {
  const Scratch<int64_t> offsets(args.num_experts + 1);
  if (!offsets) return Status::kOutOfMemory;
  sanitize_offsets(args.expert_offsets, args.num_experts, args.num_rows, offsets.get());
  const int64_t n = args.n, k = args.k;
  const bool out_in = args.weight_layout == WeightLayout::kOutIn;
  dispatch(args.dtype, [&]<typename T>(std::type_identity<T>) {
    parallel_for(pool, args.num_rows, grain(n * k), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        T* output = static_cast<T*>(args.output) + r * n;
        const int64_t e = std::upper_bound(offsets.get(), offsets.get() + args.num_experts + 1, r) - offsets.get() - 1;
        if (e < 0 || e == args.num_experts) {
          std::fill_n(output, n, T{});
          continue;
        }
        const T* row = static_cast<const T*>(args.rows) + r * k;
        const T* weight = static_cast<const T*>(args.weight) + e * n * k;
        const T* bias = args.bias ? static_cast<const T*>(args.bias) + e * n : nullptr;
        for (int64_t j = 0; j < n; ++j) {
          Wide<T> sum = 0;
          for (int64_t i = 0; i < k; ++i) sum += widen(row[i]) * widen(weight[out_in ? j * k + i : i * n + j]);
          output[j] = narrow<T>(bias ? sum + widen(bias[j]) : sum);
        }
      }
    });
  });
  return Status::kOk;
}

Status grouped_gemm_wgrad_cpu(const GroupedGemmWgradArgs& args, const ThreadPool& pool) {
  const Scratch<int64_t> offsets(args.num_experts + 1);
  if (!offsets) return Status::kOutOfMemory;
  sanitize_offsets(args.expert_offsets, args.num_experts, args.num_rows, offsets.get());
  const int64_t m = args.m, n = args.n;
  dispatch(args.dtype, [&]<typename T>(std::type_identity<T>) {
    const T* lhs = static_cast<const T*>(args.lhs);
    const T* rhs = static_cast<const T*>(args.rhs);
    parallel_for(pool, args.num_experts * m, grain(n), [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        const int64_t e = item / m, i = item % m;
        T* output = static_cast<T*>(args.output) + item * n;
        for (int64_t j = 0; j < n; ++j) {
          Wide<T> sum = 0;
          for (int64_t r = offsets.get()[e]; r < offsets.get()[e + 1]; ++r) {
            sum += widen(lhs[r * m + i]) * widen(rhs[r * n + j]);
          }
          output[j] = narrow<T>(sum);
        }
      }
    });
  });
  return Status::kOk;
}

Status grouped_gemm_bgrad_cpu(const GroupedGemmBgradArgs& args, const ThreadPool& pool) {
  const Scratch<int64_t> offsets(args.num_experts + 1);
  if (!offsets) return Status::kOutOfMemory;
  sanitize_offsets(args.expert_offsets, args.num_experts, args.num_rows, offsets.get());
  const int64_t n = args.n;
  dispatch(args.dtype, [&]<typename T>(std::type_identity<T>) {
    const T* grad = static_cast<const T*>(args.grad_output);
    parallel_for(pool, args.num_experts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t e = begin; e < end; ++e) {
        for (int64_t j = 0; j < n; ++j) {
          Wide<T> sum = 0;
          for (int64_t r = offsets.get()[e]; r < offsets.get()[e + 1]; ++r) sum += widen(grad[r * n + j]);
          static_cast<T*>(args.output)[e * n + j] = narrow<T>(sum);
        }
      }
    });
  });
  return Status::kOk;
}

}  // namespace moe
