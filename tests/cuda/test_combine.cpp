#include "moe/combine.h"

#include "grouped_gemm.cuh"
#include "stages.h"

namespace moe::test {
namespace {

template <typename T>
void check_combine(const Problem& p, const Plan& plan, int64_t offset, bool weighted) {
  const int64_t num_rows = std::ssize(plan.row_to_slot);
  const auto rows = random_values<T>(num_rows * p.hidden_size, 1);
  const auto weights = random_values<Wide<T>>(p.num_rows(), 2);
  DevicePlan maps(plan);
  DeviceArray<T> in(rows, offset), out(p.num_tokens * p.hidden_size, offset);
  DeviceArray<Wide<T>> w(weights);
  const WrittenOnce once(out);
  run_on_device([&](const CudaContext& device) {
    return combine_cuda({out.data(), in.data(), weighted ? w.data() : nullptr, maps.view(p), p.hidden_size, kDType<T>},
                        device);
  });
  const auto got = out.host();
  for (int64_t t = 0; t < p.num_tokens; ++t) {
    for (int64_t h = 0; h < p.hidden_size; ++h) {
      Sum sum;
      for (int64_t slot = t * p.top_k; slot < (t + 1) * p.top_k; ++slot) {
        const int64_t row = plan.slot_to_row[slot];
        if (row < 0 || row >= num_rows) continue;
        sum.add((weighted ? static_cast<double>(weights[slot]) : 1.0) * widen(rows[row * p.hidden_size + h]));
      }
      CHECK(is_close(got[t * p.hidden_size + h], sum));
    }
  }
}

template <typename T>
void check_backward(const Problem& p, const Plan& plan, int64_t offset) {
  const int64_t width = p.hidden_size, num_rows = std::ssize(plan.row_to_slot);
  const auto rows = random_values<T>(num_rows * width, 1), grad = random_values<T>(p.num_tokens * width, 3);
  const auto weights = random_values<Wide<T>>(p.num_rows(), 2);
  DevicePlan maps(plan);
  DeviceArray<T> in(rows, offset), grad_in(grad, offset), grad_rows(num_rows * width, offset);
  DeviceArray<Wide<T>> w(weights), grad_weights(p.num_rows());
  const WrittenOnce once(grad_rows), once_weights(grad_weights);
  run_on_device([&](const CudaContext& device) {
    return combine_backward_cuda(
        {grad_rows.data(), grad_weights.data(), grad_in.data(), in.data(), w.data(), maps.view(p), width, kDType<T>},
        device);
  });
  const auto got_rows = grad_rows.host();
  const auto got_weights = grad_weights.host();
  for (int64_t row = 0; row < num_rows; ++row) {
    const int64_t slot = plan.row_to_slot[row];
    for (int64_t h = 0; h < width; ++h) {
      Sum sum;
      if (slot >= 0 && slot < p.num_rows()) {
        sum.add(static_cast<double>(weights[slot]) * widen(grad[slot / p.top_k * width + h]));
      }
      CHECK(is_close(got_rows[row * width + h], sum));
    }
  }
  for (int64_t slot = 0; slot < p.num_rows(); ++slot) {
    const int64_t row = plan.slot_to_row[slot];
    Sum sum;
    for (int64_t h = 0; h < width && row >= 0 && row < num_rows; ++h) {
      sum.add(static_cast<double>(widen(rows[row * width + h])) * widen(grad[slot / p.top_k * width + h]));
    }
    CHECK(is_close(got_weights[slot], sum));
  }
}

// Calls fn for the problems, with good plans and bad ones, aligned and not.
template <typename Fn>
void for_plans(const Fn& fn) {
  for (const Problem& p : small_problems()) {
    const Context c(p.name);
    for (const int64_t offset : {0, 1}) {
      fn(p, sorted_plan(p), offset);
      fn(p, sorted_plan(p, 2), offset);
    }
    fn(p, kept_rows(sorted_plan(p, 2)), 0);
    fn(p, half_of(sorted_plan(p)), 0);
    for (uint32_t seed = 0; seed < 2; ++seed) fn(p, garbage_plan(p, seed), 0);
  }
}

TEST(combine_sums_rows) {
  for_each_type([]<typename T>(std::type_identity<T>) {
    for_plans([](const Problem& p, const Plan& plan, int64_t offset) {
      check_combine<T>(p, plan, offset, true);
      if (offset == 0) check_combine<T>(p, plan, offset, false);
    });
  });
}

TEST(combine_backward_of_plans) {
  for_each_type([]<typename T>(std::type_identity<T>) { for_plans(check_backward<T>); });
}

TEST(combine_of_wide_rows) {
  const Problem p{"wide", 2, 2, 2, 4200, 1, {0, 1, 1, 0}};
  check_combine<BFloat16>(p, sorted_plan(p), 0, true);
  check_combine<BFloat16>(p, sorted_plan(p), 1, true);
  check_backward<BFloat16>(p, sorted_plan(p), 0);
}

template <typename T>
void check_grad_weights(const Problem& p, const Plan& plan, int64_t num_partials, bool biased) {
  const int64_t width = p.hidden_size, rows = std::ssize(plan.row_to_slot);
  const auto partials = random_values<Wide<T>>(rows * num_partials, 1);
  const auto grad = random_values<T>(p.num_tokens * width, 2), bias = random_values<T>(p.num_experts * width, 3);
  DevicePlan maps(plan);
  DeviceArray<Wide<T>> in(partials), out(p.num_rows());
  DeviceArray<T> grad_in(grad), bias_in(bias);
  cuda::GradWeightsTask task{.grad_topk_weights = out.data(),
                             .partials = in.data(),
                             .grad_output = grad_in.data(),
                             .down_bias = biased ? bias_in.data() : nullptr,
                             .plan = maps.view(p),
                             .schedule = {},
                             .num_partials = num_partials,
                             .hidden_size = width,
                             .dtype = kDType<T>};
  const WrittenOnce once(out);
  run_on_device([&](const CudaContext& device) {
    const Status status =
        cuda::make_schedule(maps.expert_offsets.data(), rows, p.num_experts, 64, device, &task.schedule);
    return status == Status::kOk ? cuda::reduce_grad_weights(task, device) : status;
  });
  const auto got = out.host();
  const auto offsets = clamped_offsets(plan.expert_offsets, rows);
  for (int64_t slot = 0; slot < p.num_rows(); ++slot) {
    const int64_t row = plan.slot_to_row[slot];
    Sum sum;
    for (int64_t e = 0; e < p.num_experts; ++e) {
      if (row < offsets[e] || row >= offsets[e + 1]) continue;
      for (int64_t i = 0; i < num_partials; ++i) sum.add(partials[row * num_partials + i]);
      for (int64_t h = 0; h < width && biased; ++h) {
        sum.add(static_cast<double>(widen(grad[slot / p.top_k * width + h])) * widen(bias[e * width + h]));
      }
    }
    CHECK(is_close(got[slot], sum));
  }
}

TEST(grad_weights_are_gathered) {
  for_each_type([]<typename T>(std::type_identity<T>) {
    for (const Problem& p : small_problems()) {
      const Context c(p.name);
      check_grad_weights<T>(p, sorted_plan(p), 3, false);
      check_grad_weights<T>(p, sorted_plan(p, 2), 40, true);
      check_grad_weights<T>(p, half_of(sorted_plan(p)), 2, true);
      check_grad_weights<T>(p, garbage_plan(p, 1), 1, true);
    }
  });
}

}  // namespace
}  // namespace moe::test
