#include "grouped_gemm.cuh"
#include "stages.h"

namespace moe::test {
namespace {

template <typename T>
void check_bgrad(const Problem& p, const Plan& plan, int64_t offset) {
  const int64_t rows = std::ssize(plan.row_to_slot), n = p.hidden_size;
  const auto grad = random_values<T>(rows * n, 1);
  DevicePlan maps(plan);
  DeviceArray<T> in(grad, offset), out(p.num_experts * n);
  const WrittenOnce once(out);
  run_on_device([&](const CudaContext& device) {
    return grouped_gemm_bgrad_cuda(
        {out.data(), in.data(), maps.expert_offsets.data(), rows, p.num_experts, n, kDType<T>}, device);
  });
  const auto got = out.host();
  const auto offsets = clamped_offsets(plan.expert_offsets, rows);
  for (int64_t e = 0; e < p.num_experts; ++e) {
    for (int64_t j = 0; j < n; ++j) {
      Sum sum;
      for (int64_t r = offsets[e]; r < offsets[e + 1]; ++r) sum.add(widen(grad[r * n + j]));
      CHECK(is_close(got[e * n + j], sum));
    }
  }
}

// db2: rows gathered from tokens and weighted by their slot.
template <typename T>
void check_weighted(const Problem& p, const Plan& plan) {
  const int64_t rows = std::ssize(plan.row_to_slot), slots = p.num_rows(), n = p.hidden_size;
  const auto grad = random_values<T>(p.num_tokens * n, 1);
  const auto weights = random_values<Wide<T>>(slots, 2);
  DevicePlan maps(plan);
  DeviceArray<T> in(grad), out(p.num_experts * n);
  DeviceArray<Wide<T>> w(weights);
  cuda::BgradTask task{.output = out.data(),
                       .rows = in.data(),
                       .gather = {maps.row_to_slot.data(), slots, p.top_k},
                       .row_weights = w.data(),
                       .schedule = {},
                       .num_rows = rows,
                       .num_experts = p.num_experts,
                       .n = n,
                       .dtype = kDType<T>};
  const WrittenOnce once(out);
  run_on_device([&](const CudaContext& device) {
    const Status status =
        cuda::make_schedule(maps.expert_offsets.data(), rows, p.num_experts, 64, device, &task.schedule);
    return status == Status::kOk ? cuda::bgrad(task, device) : status;
  });
  const auto got = out.host();
  const auto offsets = clamped_offsets(plan.expert_offsets, rows);
  for (int64_t e = 0; e < p.num_experts; ++e) {
    for (int64_t j = 0; j < n; ++j) {
      Sum sum;
      for (int64_t r = offsets[e]; r < offsets[e + 1]; ++r) {
        const int64_t slot = plan.row_to_slot[r];
        if (slot < 0 || slot >= slots) continue;
        sum.add(static_cast<double>(weights[slot]) * widen(grad[slot / p.top_k * n + j]));
      }
      CHECK(is_close(got[e * n + j], sum));
    }
  }
}

TEST(bgrad_sums_segments) {
  for_each_type([]<typename T>(std::type_identity<T>) {
    for (const Problem& p : small_problems()) {
      const Context c(p.name);
      check_bgrad<T>(p, sorted_plan(p), 0);
      check_bgrad<T>(p, sorted_plan(p), 1);
      check_bgrad<T>(p, garbage_plan(p, 1), 0);
      check_bgrad<T>(p, half_of(sorted_plan(p)), 0);
      check_weighted<T>(p, kept_rows(sorted_plan(p, 3)));
      check_weighted<T>(p, garbage_plan(p, 2));
    }
  });
}

}  // namespace
}  // namespace moe::test
