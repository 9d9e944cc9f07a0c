// The sm_90a GEMM against sums in double: ragged groups, edges of the tile, both weight layouts, gathers with ids that
// are none, every epilogue. Shapes are small, because the emulator executes every product.
#include <cstring>

#include "sm90_cases.h"

namespace moe::test {
namespace {

struct WgradCase {
  const char* name;
  std::vector<int> rows;
  int64_t m, n;
  bool gather_lhs = false, gather_rhs = false, accumulate = false;
  int rows_outside = 0;
  int times = 1;
  bool cancels = false;  // the second half of the rows takes the first one's away: what is left is rounding
};

template <typename T>
std::vector<T> run_wgrad(const WgradCase& c) {
  const Context word(std::string(c.name) + (std::is_same_v<T, __half> ? " fp16" : " bf16"));
  const Case lhs_case{
      .name = c.name, .rows = c.rows, .n = c.n, .k = c.m, .gather = c.gather_lhs, .rows_outside = c.rows_outside};
  const Case rhs_case{
      .name = c.name, .rows = c.rows, .n = c.n, .k = c.m, .gather = c.gather_rhs, .rows_outside = c.rows_outside};
  const Rows rows(lhs_case);
  const int64_t e = static_cast<int64_t>(c.rows.size()), r = rows.total;
  auto lhs = normal<T>((c.gather_lhs ? rows.tokens : r) * c.m, 1, 1);
  auto rhs = normal<T>((c.gather_rhs ? rows.tokens : r) * c.n, 1, 2);
  // What no expert owns must not be read into a sum.
  if (!c.gather_lhs) std::fill(lhs.end() - c.rows_outside * c.m, lhs.end(), narrow<T>(NAN));
  if (!c.gather_rhs) std::fill(rhs.end() - c.rows_outside * c.n, rhs.end(), narrow<T>(NAN));
  if (c.cancels) {
    for (int64_t i = 0; i < r / 2 * c.m; ++i) lhs[r / 2 * c.m + i] = -lhs[i];
    std::copy_n(rhs.begin(), r / 2 * c.n, rhs.begin() + r / 2 * c.n);
  }
  const auto old = normal<T>(e * c.m * c.n, 1, 3);
  const Device dl(lhs), dr(rhs), offsets(rows.offsets), row_to_slot(rows.row_to_slot);
  const Device fresh(e * c.m * c.n * sizeof(T)), kept(old);
  const Device& output = c.accumulate ? kept : fresh;
  const CudaContext context = context_of_test();
  const cuda::Gather gather{static_cast<const int32_t*>(row_to_slot.data()), kTopK * rows.tokens, kTopK};
  cuda::WgradTask task{};
  task.output = output.data(), task.lhs = dl.data(), task.rhs = dr.data();
  if (c.gather_lhs) task.lhs_gather = gather;
  if (c.gather_rhs) task.rhs_gather = gather;
  task.num_rows = r, task.num_experts = e, task.m = c.m, task.n = c.n;
  task.dtype = kDType<T>, task.accumulate = c.accumulate;
  CHECK(cuda::make_schedule(static_cast<const int32_t*>(offsets.data()), r, e, 128, context, &task.schedule) ==
        Status::kOk);
  for (int i = 0; i < c.times; ++i) {
    if (i > 0) CHECK(cudaMemset(task.output, 0xff, e * c.m * c.n * sizeof(T)) == cudaSuccess);
    CHECK(cuda::wgrad_sm90(task, context) == Status::kOk);
  }
  CHECK(cudaDeviceSynchronize() == cudaSuccess);
  free_scratch();
  const auto got = output.read<T>();
  for (int64_t expert = 0; expert < e; ++expert) {
    for (int64_t m = 0; m < c.m; ++m) {
      for (int64_t n = 0; n < c.n; ++n) {
        const int64_t at = (expert * c.m + m) * c.n + n;
        double sum = c.accumulate ? widen(old[at]) : 0, magnitude = std::abs(sum);
        for (int i = rows.offsets[expert]; i < rows.offsets[expert + 1]; ++i) {
          const int l = rows.source(lhs_case, i), q = rows.source(rhs_case, i);
          if (l < 0 || q < 0) continue;
          const double term = widen(lhs[l * c.m + m]) * widen(rhs[q * c.n + n]);
          sum += term, magnitude += std::abs(term);
        }
        check_close<T>(widen(got[at]), sum, magnitude, "gradient", static_cast<int>(expert * c.m + m), n);
      }
    }
  }
  return got;
}

TEST(store) {
  run_both({.name = "ragged", .rows = {130, 0, 1, 77}, .n = 264, .k = 136, .bias = true, .rows_outside = 9});
  run_both({.name = "in_out", .rows = {64, 5, 0}, .n = 72, .k = 200, .layout = kInOut, .rows_outside = 3});
  run<__nv_bfloat16>({.name = "one expert, many steps", .rows = {150}, .n = 256, .k = 648});
  run<__nv_bfloat16>(
      {.name = "several tiles per block", .rows = {128, 200, 0, 30}, .n = 520, .k = 72, .layout = kInOut});
  // A contracted width that is not short: wide tiles, two of one expert by a cluster and two of different ones, and an
  // odd number of them.
  run<__nv_bfloat16>({.name = "wide", .rows = {200, 130, 5}, .n = 264, .k = 1032, .bias = true, .rows_outside = 2});
  run<__half>({.name = "wide, in_out", .rows = {140, 0, 129}, .n = 136, .k = 1032, .layout = kInOut});
  run<__nv_bfloat16>({.name = "turns of more stages than the ring has", .rows = {130, 100}, .n = 392, .k = 456});
  run<__nv_bfloat16>({.name = "tiles of 64", .rows = {65, 0, 10}, .n = 40, .k = 8, .tile_rows = 64});
  run<__nv_bfloat16>({.name = "no rows", .rows = {0, 0}, .n = 16, .k = 16});
  run<__nv_bfloat16>({.name = "only rows outside", .rows = {0, 0}, .n = 16, .k = 16, .rows_outside = 5});
}

TEST(store_gathered) {
  run_both({.name = "ragged", .rows = {100, 0, 30, 1}, .n = 264, .k = 136, .gather = true, .bias = true});
  run_both({.name = "few tiles", .rows = {30, 1}, .n = 136, .k = 200, .layout = kInOut, .gather = true, .bias = true});
  run<__nv_bfloat16>({.name = "many steps", .rows = {20, 129}, .n = 80, .k = 600, .layout = kInOut, .gather = true});
}

TEST(activation) {
  run_both({.name = "concat",
            .rows = {70, 0, 13},
            .n = 2 * 136,
            .k = 72,
            .gather = true,
            .bias = true,
            .epilogue = Epilogue::kActivation,
            .rows_outside = 3});
  run_both({.name = "interleaved",
            .rows = {66, 3},
            .n = 2 * 136,
            .k = 72,
            .layout = kInOut,
            .bias = true,
            .epilogue = Epilogue::kActivation,
            .activation = kGptOss});
  run_both({.name = "interleaved, few tiles",
            .rows = {66},
            .n = 2 * 136,
            .k = 72,
            .gather = true,
            .bias = true,
            .epilogue = Epilogue::kActivation,
            .activation = kGptOss});
  for (const Activation kind : {Activation::kGeGLU, Activation::kGeGLUTanh, Activation::kReGLU, Activation::kSiLU,
                                Activation::kGELU, Activation::kGELUTanh, Activation::kReLU, Activation::kReLU2}) {
    run<__nv_bfloat16>({.name = "kind",
                        .rows = {5, 9},
                        .n = 144,
                        .k = 16,
                        .epilogue = Epilogue::kActivation,
                        .activation = {kind, GateLayout::kConcat, 1, INFINITY, 0}});
  }
}

TEST(activation_backward) {
  run_both({.name = "concat",
            .rows = {70, 0, 13, 128},
            .n = 136,
            .k = 72,
            .layout = kInOut,
            .gather = true,
            .epilogue = Epilogue::kActivationBackward,
            .rows_outside = 3});
  run<__nv_bfloat16>({.name = "turns of more stages than the ring has",
                      .rows = {130, 60},
                      .n = 264,
                      .k = 392,
                      .gather = true,
                      .epilogue = Epilogue::kActivationBackward});
  run_both({.name = "interleaved, in place",
            .rows = {66, 3},
            .n = 264,
            .k = 40,
            .gather = true,
            .epilogue = Epilogue::kActivationBackward,
            .activation = kGptOss,
            .in_place = true});
  for (const Activation kind : {Activation::kGeGLU, Activation::kGeGLUTanh, Activation::kReGLU, Activation::kSiLU,
                                Activation::kGELU, Activation::kGELUTanh, Activation::kReLU, Activation::kReLU2}) {
    run<__nv_bfloat16>({.name = "kind",
                        .rows = {5, 9},
                        .n = 72,
                        .k = 16,
                        .epilogue = Epilogue::kActivationBackward,
                        .activation = {kind, GateLayout::kConcat, 1, INFINITY, 0}});
  }
}

TEST(wgrad) {
  const WgradCase ragged{.name = "ragged", .rows = {70, 0, 13, 300}, .m = 136, .n = 264, .rows_outside = 9};
  run_wgrad<__nv_bfloat16>(ragged);
  run_wgrad<__half>(ragged);
  run_wgrad<__nv_bfloat16>(
      {.name = "accumulate", .rows = {0, 64, 1}, .m = 72, .n = 40, .accumulate = true, .rows_outside = 2});
  run_wgrad<__half>(
      {.name = "gathered lhs", .rows = {30, 0, 99}, .m = 72, .n = 136, .gather_lhs = true, .rows_outside = 5});
  run_wgrad<__nv_bfloat16>({.name = "gathered rhs", .rows = {129, 31}, .m = 200, .n = 8, .gather_rhs = true});
  run_wgrad<__nv_bfloat16>({.name = "no rows", .rows = {0, 0}, .m = 16, .n = 16});
}

// Tiles are fewer than multiprocessors, so that several blocks add to one; an expert has fewer stages than there are
// parts, one has none, and the second gradient finds the counters as the first one left them.
TEST(wgrad_in_parts) {
  const Multiprocessors eight(8);
  run_wgrad<__nv_bfloat16>({.name = "parts", .rows = {4000, 100}, .m = 72, .n = 40, .rows_outside = 3, .times = 2});
  run_wgrad<__half>(
      {.name = "gathered, accumulate", .rows = {0, 4100}, .m = 40, .n = 72, .gather_rhs = true, .accumulate = true});
}

// Whichever block comes last, the sum is the same to the bit.
TEST(wgrad_parts_are_added_in_order) {
  const Multiprocessors eight(8);
  std::vector<std::vector<__half>> gradients;
  for ([[maybe_unused]] const uint64_t seed : {0, 6, 17, 18}) {
#ifdef CUDA_ON_CPU
    emu::set_seed(seed);  // schedules in which not always the same block comes last
#endif
    gradients.push_back(run_wgrad<__half>({.name = "order", .rows = {2200}, .m = 128, .n = 32, .cancels = true}));
  }
  for (const auto& other : gradients) {
    CHECK(std::memcmp(other.data(), gradients[0].data(), other.size() * sizeof(__half)) == 0);
  }
}

}  // namespace
}  // namespace moe::test
