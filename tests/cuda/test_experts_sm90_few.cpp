// The layer's forward for few slots: routed_experts against sums in double, and against plan and experts where those
// serve it.
#include <algorithm>

#include "device_layer.h"
#include "emulated_gpu.h"
#include "experts_few.h"

namespace moe::test {
namespace {

constexpr ActivationOptions kInterleaved{Activation::kSwiGLU, GateLayout::kInterleaved, 1.702, 1.5, 1};
constexpr WeightLayout kOutIn = WeightLayout::kOutIn, kInOut = WeightLayout::kInOut;

std::vector<int32_t> some_ids(int64_t slots, int32_t num_experts) {
  std::vector<int32_t> ids(slots);
  for (size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<int32_t>(i * i / 3 * 7 % num_experts);
  return ids;
}

struct Options {
  WeightLayout layout = kOutIn;
  ActivationOptions activation = kSwiGLU;
  bool biased = false, row_invariant = false;
  size_t shift = 0;
};

// The output of routed_experts; with `by_plan` of plan and then experts, as two calls.
template <typename T>
std::vector<T> run(const Layer<T>& l, const Options& options, bool by_plan = false) {
  const Problem& p = l.p;
  const Plan& plan = l.plan;
  const DeviceLayer<T> d{l, options.shift};
  const DeviceArray<int32_t> ids(p.topk_ids);
  DeviceArray<int32_t> offsets(plan.expert_offsets.size()), row_to_slot(ids.size()), slot_to_row(ids.size());
  DeviceArray<T> output(l.x.size(), options.shift);
  ExpertsLayer layer = d.args();
  layer.row_invariant = options.row_invariant;
  layer.plan.expert_offsets = offsets.data();
  layer.plan.row_to_slot = row_to_slot.data();
  layer.plan.slot_to_row = slot_to_row.data();
  const PlanArgs plan_args{
      offsets.data(), row_to_slot.data(), slot_to_row.data(), ids.data(), p.num_tokens, p.num_experts, p.top_k, -1};
  const WrittenOnce once(output);
  run_on_device([&](const CudaContext& cuda) {
    const ExpertsArgs args{output.data(), nullptr, layer};
    if (!by_plan) return routed_experts_cuda({plan_args, args}, cuda);
    const Status status = plan_cuda(plan_args, cuda);
    return status == Status::kOk ? experts_cuda(args, cuda) : status;
  });
  return output.host();
}

template <typename T>
void check_experts(const Problem& p, const Options& options) {
  const Context c(p.name + (std::is_same_v<T, Float16> ? " fp16" : " bf16"));
  const Plan plan = sorted_plan(p);
  const Layer<T> l{p, plan, options.activation, options.layout, options.biased};
  CHECK(all_close<T>(run(l, options), reference(l).output));
}

TEST(few_slots) {
  const Multiprocessors three(3);
  check_experts<BFloat16>({"one token", 1, 9, 3, 144, 72, {7, 0, 4}}, {.biased = true});
  check_experts<BFloat16>({"some experts", 7, 40, 3, 72, 136, some_ids(21, 40)},
                          {.layout = kInOut, .activation = kInterleaved});
  check_experts<Float16>({"as many slots as there may be", 32, 16, 8, 136, 40, some_ids(256, 16)}, {.biased = true});
  check_experts<Float16>({"tiles of one expert", 150, 1, 1, 40, 72, std::vector<int32_t>(150, 0)}, {});
  check_experts<BFloat16>({"one piece", 3, 2, 1, 8, 8, {1, 1, 0}}, {.layout = kInOut, .biased = true});
}

// An expert that a token has twice, and slots of none: at the first, at the last, and at all places of a token.
TEST(few_slots_of_any_ids) {
  const Multiprocessors three(3);
  constexpr int32_t kLeast = INT32_MIN, kMost = INT32_MAX;
  check_experts<BFloat16>({"any ids", 5, 4, 3, 40, 72, {-1, 2, 2, 3, 3, 4, kMost, kLeast, -1, 1, -7, 1, 0, 2, kMost}},
                          {.biased = true});
  check_experts<BFloat16>({"of no expert", 4, 3, 2, 40, 24, std::vector<int32_t>(8, 3)}, {});
}

// The second product has so few tiles that several blocks share one.
TEST(few_slots_in_parts) {
  const Multiprocessors eight(8);
  check_experts<BFloat16>({"one tile", 2, 1, 1, 72, 712, {0, 0}}, {.biased = true});
  check_experts<Float16>({"two experts", 3, 5, 2, 40, 648, {1, 4, 4, 1, -1, 1}}, {.layout = kInOut, .biased = true});
}

// Whichever block comes last: to the bit. The biases leave of each sum what its rounding to 16 bits took away, so that
// the last bits of fp32 are seen.
TEST(few_slots_are_added_in_order) {
  const Multiprocessors eight(8);
  const Problem p{"six parts", 1, 1, 1, 128, 648, {0}};
  const Plan plan = sorted_plan(p);
  Layer<Float16> l{p, plan, kSwiGLU, kOutIn, true};
  std::ranges::fill(l.s, 1.0f);
  std::ranges::fill(l.b2, narrow<Float16>(0.0f));
  const std::vector<Float16> rounded = run(l, {});
  std::ranges::transform(rounded, l.b2.begin(), [](Float16 x) { return narrow<Float16>(-widen(x)); });
  std::vector<std::vector<Float16>> outputs;
  for (int i = 0; i < 8; ++i) {
#ifdef CUDA_ON_CPU
    emu::set_seed(static_cast<uint64_t>(i));  // another schedule
#endif
    outputs.push_back(run(l, {}));
  }
  for (const auto& other : outputs) CHECK(same_bits(other, outputs[0]));
}

// More slots, other types, rows between pieces, other GPUs, and who asks for the bits of any number of rows.
TEST(other_slots_have_the_bits_of_a_plan) {
  const auto same = [](const Problem& p, const Options& options, auto type) {
    using T = typename decltype(type)::type;
    const Plan plan = sorted_plan(p);
    const Layer<T> l{p, plan, options.activation, options.layout, options.biased};
    CHECK(same_bits(run(l, options), run(l, options, true)));
  };
  constexpr std::type_identity<BFloat16> kHalf;
  const Problem small{"small", 5, 4, 2, 40, 24, some_ids(10, 4)};
  same({"one slot too many", 257, 4, 1, 24, 16, some_ids(257, 4)}, {}, kHalf);
  same(small, {}, std::type_identity<float>{});
  same(small, {.shift = 1}, kHalf);
  same(small, {.row_invariant = true}, kHalf);
  same({"odd sizes", 5, 4, 2, 37, 24, some_ids(10, 4)}, {}, kHalf);
  same({"no tokens", 0, 4, 2, 40, 24, {}}, {}, kHalf);
#ifdef CUDA_ON_CPU  // a GPU that is an sm_90 has other kernels for these
  const Architecture a(80);
  same(small, {}, kHalf);
#endif
}

}  // namespace
}  // namespace moe::test
