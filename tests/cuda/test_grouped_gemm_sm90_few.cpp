// The sm_90a GEMM for few rows: every width that wgmma gets, every epilogue, and sums that several blocks share.
#include <cstring>

#include "sm90_cases.h"

namespace moe::test {
namespace {

Case few(Case c) {
  c.gemm = cuda::gemm_sm90_few;
  c.tile_rows = 64;
  return c;
}

TEST(store) {
  const Multiprocessors three(3);
  run_both(few({.name = "every width",
                .rows = {9, 0, 1, 17, 64, 8, 33, 16},
                .n = 136,
                .k = 200,
                .gather = true,
                .bias = true,
                .rows_outside = 9}));
  run_both(few({.name = "in_out", .rows = {5, 65, 0}, .n = 72, .k = 136, .layout = kInOut, .rows_outside = 3}));
  run<__nv_bfloat16>(few({.name = "many steps", .rows = {3}, .n = 520, .k = 1352, .gather = true}));
  run<__nv_bfloat16>(few({.name = "all on one expert", .rows = {0, 150, 0}, .n = 40, .k = 72, .layout = kInOut}));
  run<__nv_bfloat16>(few({.name = "one row, one piece", .rows = {0, 1}, .n = 8, .k = 8}));
  run<__nv_bfloat16>(few({.name = "no rows", .rows = {0, 0}, .n = 16, .k = 16}));
  run<__nv_bfloat16>(few({.name = "only rows outside", .rows = {0, 0}, .n = 16, .k = 16, .rows_outside = 5}));
}

TEST(activation) {
  const Multiprocessors three(3);
  run_both(few({.name = "concat",
                .rows = {20, 0, 3},
                .n = 2 * 136,
                .k = 72,
                .gather = true,
                .bias = true,
                .epilogue = Epilogue::kActivation,
                .rows_outside = 3}));
  run_both(few({.name = "interleaved",
                .rows = {36, 3},
                .n = 2 * 72,
                .k = 72,
                .layout = kInOut,
                .gather = true,
                .bias = true,
                .epilogue = Epilogue::kActivation,
                .activation = kGptOss}));
  run<__half>(few({.name = "not gated",
                   .rows = {5, 9},
                   .n = 144,
                   .k = 16,
                   .epilogue = Epilogue::kActivation,
                   .activation = {Activation::kGELU, GateLayout::kConcat, 1, INFINITY, 0}}));
}

TEST(activation_backward) {
  const Multiprocessors three(3);
  run_both(few({.name = "concat",
                .rows = {7, 0, 34},
                .n = 136,
                .k = 72,
                .layout = kInOut,
                .gather = true,
                .epilogue = Epilogue::kActivationBackward,
                .rows_outside = 3}));
  run<__nv_bfloat16>(few({.name = "interleaved, in place",
                          .rows = {12, 3},
                          .n = 72,
                          .k = 40,
                          .gather = true,
                          .epilogue = Epilogue::kActivationBackward,
                          .activation = kGptOss,
                          .in_place = true}));
}

// Tiles are fewer than multiprocessors, so that several blocks add to one. The second product of the same schedule
// finds the counters as the first one left them.
TEST(parts) {
  const Multiprocessors eight(8);
  run_both(few({.name = "store", .rows = {9, 0, 1}, .n = 72, .k = 712, .gather = true, .bias = true, .times = 2}));
  run_both(few({.name = "activation",
                .rows = {3},
                .n = 2 * 136,
                .k = 648,
                .layout = kInOut,
                .gather = true,
                .bias = true,
                .epilogue = Epilogue::kActivation,
                .rows_outside = 2,
                .times = 2}));
  run<__nv_bfloat16>(few({.name = "backward",
                          .rows = {7},
                          .n = 136,
                          .k = 392,
                          .gather = true,
                          .epilogue = Epilogue::kActivationBackward}));
}

// Whichever block comes last, the sum is the same to the bit: that of the partial sums, which are not rounded further.
TEST(parts_are_added_in_order) {
  const Multiprocessors eight(8);
  std::vector<std::vector<float>> sums;
  for (int i = 0; i < 8; ++i) {
#ifdef CUDA_ON_CPU
    emu::set_seed(static_cast<uint64_t>(i));  // another schedule
#endif
    sums.push_back(run<__half>(few({.name = "order",
                                    .rows = {9},
                                    .n = 72,
                                    .k = 1544,
                                    .gather = true,
                                    .epilogue = Epilogue::kActivationBackward}))
                       .partials);
  }
  for (const auto& other : sums) CHECK(std::memcmp(other.data(), sums[0].data(), other.size() * sizeof(float)) == 0);
}

TEST(number_of_parts) {
  using cuda::count_parts;
  CHECK(count_parts(88, 44, 132) == 3);  // two full waves instead of two thirds of one
  CHECK(count_parts(176, 11, 132) == 1);
  CHECK(count_parts(1, 44, 132) == 8);
  CHECK(count_parts(1, 1, 132) == 1);
  CHECK(count_parts(66, 64, 132) == 2);
  CHECK(count_parts(131, 64, 132) == 1);
  CHECK(count_parts(32, 128, 132, 4) == 4);  // weight gradients: adding a part takes as long as four stages
  CHECK(count_parts(32, 16, 132, 4) == 1);
  for (int64_t tiles = 1; tiles < 300; ++tiles) {
    for (int64_t steps = 1; steps < 70; ++steps) {
      const int64_t parts = count_parts(tiles, steps, 132);
      CHECK(parts >= 1 && parts <= steps && (parts == 1 || tiles < 132));
    }
  }
}

}  // namespace
}  // namespace moe::test
