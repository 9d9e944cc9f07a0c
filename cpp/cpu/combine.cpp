#include "moe/combine.h"

#include "convert.h"
#include "parallel.h"
#include "plan_view.h"
#include "reduce.h"

namespace moe {
namespace {

// Elements that are worth a thread.
constexpr int64_t kElementGrain = 1 << 14;
// Columns summed at a time: the sums stay in the first-level cache, and a single token still feeds several threads.
constexpr int64_t kColumns = 512;

template <typename T>
void combine(const CombineArgs& args, const ThreadPool& pool) {
  const auto* rows = static_cast<const T*>(args.rows);
  const auto* weights = static_cast<const Wide<T>*>(args.topk_weights);
  auto* output = static_cast<T*>(args.output);
  const int64_t width = args.hidden_size, top_k = args.plan.top_k, blocks = ceil_div(width, kColumns);
  const int64_t grain = items_of_work(kElementGrain, std::min(width, kColumns) * top_k);
  parallel_for(pool, args.plan.num_tokens * blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t token = item / blocks, first = item % blocks * kColumns, n = std::min(kColumns, width - first);
      Wide<T> sums[kColumns] = {};
      for (int64_t slot = token * top_k; slot < (token + 1) * top_k; ++slot) {
        const int64_t row = row_of(args.plan, slot);
        if (row < 0) continue;
        const Wide<T> weight = weights ? weights[slot] : Wide<T>{1};
        const T* __restrict source = rows + row * width + first;
        for (int64_t j = 0; j < n; ++j) sums[j] += weight * widen(source[j]);
      }
      T* __restrict target = output + token * width + first;
      for (int64_t j = 0; j < n; ++j) target[j] = narrow<T>(sums[j]);
    }
  });
}

template <typename T>
void combine_backward(const CombineBackwardArgs& args, const ThreadPool& pool) {
  const auto* rows = static_cast<const T*>(args.rows);
  const auto* grad_output = static_cast<const T*>(args.grad_output);
  const auto* weights = static_cast<const Wide<T>*>(args.topk_weights);
  auto* grad_rows = static_cast<T*>(args.grad_rows);
  auto* grad_weights = static_cast<Wide<T>*>(args.grad_topk_weights);
  const int64_t width = args.hidden_size, top_k = args.plan.top_k;
  const int64_t grain = items_of_work(kElementGrain, width);

  parallel_for(pool, args.plan.num_rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      T* __restrict target = grad_rows + row * width;
      const int64_t slot = slot_of(args.plan, row);
      if (slot < 0) {
        std::fill_n(target, width, T{});
        continue;
      }
      const T* __restrict source = grad_output + slot / top_k * width;
      const Wide<T> weight = weights[slot];
      for (int64_t j = 0; j < width; ++j) target[j] = narrow<T>(weight * widen(source[j]));
    }
  });
  parallel_for(pool, num_slots(args.plan), grain, [&](int64_t begin, int64_t end) {
    for (int64_t slot = begin; slot < end; ++slot) {
      const int64_t row = row_of(args.plan, slot);
      if (row < 0) {
        grad_weights[slot] = 0;
        continue;
      }
      const T* __restrict a = rows + row * width;
      const T* __restrict b = grad_output + slot / top_k * width;
      grad_weights[slot] = reduce_sum<Wide<T>>(width, [&](int64_t j) { return widen(a[j]) * widen(b[j]); });
    }
  });
}

}  // namespace

Status combine_cpu(const CombineArgs& args, const ThreadPool& pool) {
  dispatch(args.dtype, [&]<typename T>(std::type_identity<T>) { combine<T>(args, pool); });
  return Status::kOk;
}

Status combine_backward_cpu(const CombineBackwardArgs& args, const ThreadPool& pool) {
  dispatch(args.dtype, [&]<typename T>(std::type_identity<T>) { combine_backward<T>(args, pool); });
  return Status::kOk;
}

}  // namespace moe
