#include "moe/experts.h"

#include <algorithm>

#include "device_layer.h"
#include "emulated_gpu.h"
#include "stages.h"

namespace moe::test {
namespace {

template <typename T>
struct Results {
  std::vector<T> output, pre, x, w1, w2, b1, b2;
  std::vector<Wide<T>> s;
};

struct Options {
  bool recompute = false;
  bool accumulate = false;  // to gradients of 0.5
  bool row_invariant = false;
  size_t shift = 0;
};

template <typename T>
Results<T> run(const Layer<T>& l, const Options& options) {
  const DeviceLayer<T> d{l, options.shift};
  const auto args = [&] {
    ExpertsLayer args = d.args();
    args.row_invariant = options.row_invariant;
    return args;
  };
  const size_t shift = options.shift;
  const auto weight_grad = [&](size_t n) {
    return options.accumulate ? std::vector<T>(n, narrow<T>(Wide<T>(0.5))) : unwritten<T>(n);
  };
  DeviceArray<T> output(l.x.size(), shift), pre(l.plan.row_to_slot.size() * static_cast<size_t>(l.pre), shift),
      x(l.x.size(), shift);
  DeviceArray<T> w1(weight_grad(l.w1.size()), shift), w2(weight_grad(l.w2.size()), shift);
  DeviceArray<T> b1(l.b1.size(), shift), b2(l.b2.size(), shift);
  DeviceArray<Wide<T>> s(l.s.size());
  run_on_device([&](const CudaContext& cuda) {
    const Status status = experts_cuda({output.data(), options.recompute ? nullptr : pre.data(), args()}, cuda);
    if (status != Status::kOk) return status;
    return experts_backward_cuda(
        {x.data(), w1.data(), w2.data(), l.biased ? b1.data() : nullptr, l.biased ? b2.data() : nullptr, s.data(),
         d.grad_output.data(), options.recompute ? nullptr : pre.data(), args(), options.accumulate},
        cuda);
  });
  return {output.host(), pre.host(), x.host(), w1.host(), w2.host(), b1.host(), b2.host(), s.host()};
}

template <typename T>
void check_experts(const Problem& p, const Plan& plan, const ActivationOptions& activation, WeightLayout layout,
                   bool biased, const Options& options = {}) {
  const Layer<T> l{p, plan, activation, layout, biased};
  Gradients expected = reference(l);
  if (options.accumulate) {
    for (auto* grad : {&expected.w1, &expected.w2}) {
      for (double& g : *grad) g += 0.5;
    }
  }
  const Results<T> got = run(l, options);
  CHECK(all_close<T>(got.output, expected.output));
  if (!options.recompute) {
    for (int64_t i = plan.expert_offsets.back() * l.pre; i < std::ssize(got.pre); ++i) CHECK(widen(got.pre[i]) == 0);
  }
  CHECK(all_close<T>(got.x, expected.x));
  CHECK(all_close<T>(got.w1, expected.w1));
  CHECK(all_close<T>(got.w2, expected.w2));
  CHECK(all_close<T>(got.s, expected.s));
  if (biased) CHECK(all_close<T>(got.b1, expected.b1) && all_close<T>(got.b2, expected.b2));
}

std::vector<int32_t> ids(int64_t rows, int32_t num_experts) {
  std::vector<int32_t> ids(rows);
  for (size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<int32_t>(i * i / 3 % num_experts);
  return ids;
}

// Beside the shared ones: tiles of 128 rows and several columns, and sizes whose rows are whole pieces or not.
std::vector<Problem> all_problems() {
  std::vector<Problem> all = problems();
  std::erase_if(all, [](const Problem& p) { return p.name == "many_slots" || p.name == "many_experts_2048"; });
  all.push_back({"odd_sizes", 30, 3, 2, 37, 53, ids(60, 3)});
  all.push_back({"tall_tiles", 150, 2, 1, 72, 136, ids(150, 2)});
  return all;
}

constexpr ActivationOptions kInterleaved{Activation::kSwiGLU, GateLayout::kInterleaved, 1, INFINITY, 0};

// However few rows a part leaves an expert.
TEST(experts_of_a_part_have_the_bits_of_the_whole) {
  const Options options{.row_invariant = true};
  for (const int architecture : {80, 90}) {
    const Architecture a(architecture);
    const Problem whole{"whole", 140, 2, 1, 256, 128, ids(140, 2)};
    const Plan whole_plan = sorted_plan(whole);
    const Results<BFloat16> all = run(Layer<BFloat16>{whole, whole_plan, kSwiGLU, WeightLayout::kOutIn, true}, options);
    for (const int64_t tokens : {3, 70}) {
      const Context c(std::to_string(architecture) + " " + std::to_string(tokens) + " tokens");
      Problem part = whole;
      part.num_tokens = tokens;
      part.topk_ids.resize(static_cast<size_t>(tokens));
      const Plan plan = sorted_plan(part);
      const Results<BFloat16> some = run(Layer<BFloat16>{part, plan, kSwiGLU, WeightLayout::kOutIn, true}, options);
      const auto same = [](const auto& few, auto many) {
        many.resize(few.size());
        return same_bits(few, many);
      };
      CHECK(same(some.output, all.output));
      CHECK(same(some.x, all.x));
      CHECK(same(some.s, all.s));
    }
  }
}

TEST(experts_of_every_shape) {
  const Architecture a(80);
  for (const Problem& p : all_problems()) {
    const Context c(p.name);
    for_each_type([&]<typename T>(std::type_identity<T>) {
      check_experts<T>(p, sorted_plan(p), kSwiGLU, WeightLayout::kOutIn, true);
      check_experts<T>(p, sorted_plan(p, 3), kInterleaved, WeightLayout::kInOut, false);
    });
  }
}

TEST(experts_of_every_shape_on_sm90) {
  const Architecture a(90);
  for (const Problem& p : all_problems()) {
    const Context c(p.name);
    check_experts<BFloat16>(p, sorted_plan(p), kSwiGLU, WeightLayout::kOutIn, true);
    check_experts<Float16>(p, kept_rows(sorted_plan(p, 3)), kInterleaved, WeightLayout::kInOut, false,
                           {.recompute = true});
  }
}

TEST(experts_with_options) {
  const Architecture a(80);
  const std::vector<Problem> all = all_problems();
  for (const char* name : {"odd_sizes", "empty_expert"}) {
    const Problem& p = *std::ranges::find(all, name, &Problem::name);
    const Context c(p.name);
    for_each_type([&]<typename T>(std::type_identity<T>) {
      check_experts<T>(p, sorted_plan(p), kSwiGLU, WeightLayout::kOutIn, true, {.recompute = true});
      check_experts<T>(p, sorted_plan(p), kInterleaved, WeightLayout::kOutIn, true, {.accumulate = true, .shift = 1});
      check_experts<T>(p, half_of(sorted_plan(p)), kSwiGLU, WeightLayout::kOutIn, true);
    });
  }
}

TEST(experts_of_every_activation) {
  const Problem p{"small", 9, 2, 2, 19, 21, ids(18, 2)};
  for (const ActivationOptions& activation : all_activations()) {
    const Context c("activation " + std::to_string(static_cast<int>(activation.activation)));
    check_experts<double>(p, sorted_plan(p), activation, WeightLayout::kOutIn, true);
    check_experts<BFloat16>(p, sorted_plan(p), activation, WeightLayout::kInOut, true);
  }
}

// What goes by rows is the same as on the CPU. What goes back to tokens need only be finite: maps that are not inverse
// have no right sum.
TEST(experts_with_garbage_plans) {
  const auto finite = [](const auto& values) {
    return std::ranges::all_of(values, [](auto v) { return std::isfinite(v); });
  };
  for (const Problem& p : all_problems()) {
    const Context c(p.name);
    for (const uint32_t seed : {1, 2, 3}) {
      const Plan plan = garbage_plan(p, seed);
      const Layer<float> l{p, plan, kSwiGLU, WeightLayout::kOutIn, true};
      const Results<float> got = run(l, {});
      auto output = unwritten<float>(l.x.size()), pre = unwritten<float>(got.pre.size()), x = output;
      auto w1 = unwritten<float>(l.w1.size()), w2 = unwritten<float>(l.w2.size()), s = unwritten<float>(l.s.size());
      auto b1 = unwritten<float>(l.b1.size()), b2 = unwritten<float>(l.b2.size());
      CHECK(experts_cpu({output.data(), pre.data(), l.args()}, kPool<1>) == Status::kOk);
      CHECK(experts_backward_cpu({x.data(), w1.data(), w2.data(), b1.data(), b2.data(), s.data(), l.grad_output.data(),
                                  pre.data(), l.args()},
                                 kPool<1>) == Status::kOk);
      CHECK(finite(got.output) && finite(got.x) && finite(got.s));
      CHECK(all_close<float>(got.pre, to_double(pre)));
      CHECK(all_close<float>(got.w1, to_double(w1)) && all_close<float>(got.w2, to_double(w2)));
      CHECK(all_close<float>(got.b1, to_double(b1)) && all_close<float>(got.b2, to_double(b2)));
    }
  }
}

// A gradient that nobody asks for is not computed, and the others are the same to the bit.
TEST(experts_leave_out_null_gradients) {
  const std::vector<Problem> all = all_problems();
  const Problem& p = *std::ranges::find(all, "empty_expert", &Problem::name);
  const Plan plan = sorted_plan(p);
  const Layer<BFloat16> l{p, plan, kSwiGLU, WeightLayout::kOutIn, true};
  const DeviceLayer<BFloat16> d{l, 0};
  const Results<BFloat16> expected = run(l, {});
  const DeviceArray<BFloat16> pre(expected.pre);
  DeviceArray<BFloat16> x(l.x.size()), w1(l.w1.size()), w2(l.w2.size()), b1(l.b1.size()), b2(l.b2.size());
  DeviceArray<float> s(l.s.size());
  const auto backward = [&](int wanted) {
    const auto want = [&](int i, void* p) { return i == wanted ? p : nullptr; };
    run_on_device([&](const CudaContext& cuda) {
      return experts_backward_cuda({want(0, x.data()), want(1, w1.data()), want(2, w2.data()), want(3, b1.data()),
                                    want(4, b2.data()), want(5, s.data()), d.grad_output.data(), pre.data(), d.args()},
                                   cuda);
    });
  };
  for (int i = 0; i < 6; ++i) backward(i);
  backward(-1);
  CHECK(same_bits(x.host(), expected.x));
  CHECK(same_bits(w1.host(), expected.w1));
  CHECK(same_bits(w2.host(), expected.w2));
  CHECK(same_bits(b1.host(), expected.b1));
  CHECK(same_bits(b2.host(), expected.b2));
  CHECK(same_bits(s.host(), expected.s));
}

}  // namespace
}  // namespace moe::test
