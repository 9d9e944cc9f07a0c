#include "moe/grouped_gemm.h"

#include <algorithm>

#include "device.h"
#include "emulated_gpu.h"
#include "moe/isa.h"
#include "support.h"

namespace moe::test {
namespace {

struct Shape {
  std::string name;
  std::vector<int32_t> offsets;
  int64_t rows, n, k;
};

// Rows of a tile are 64 up to 64 rows per expert, else 128; columns 64 or 128; blocks of k 16 or 32.
std::vector<Shape> shapes() {
  return {
      {"ragged", {0, 3, 3, 70, 71, 130}, 130, 130, 40},
      {"tall", {0, 131, 133, 300}, 300, 72, 64},
      {"single_row", {0, 0, 1, 1}, 1, 16, 8},
      {"one_expert", {0, 0, 200}, 200, 64, 96},
      {"unaligned", {0, 20, 37}, 37, 37, 53},
      {"rows_of_no_expert", {2, 5, 9}, 12, 9, 33},
      {"garbage_offsets", {-7, 9, 4, 1 << 30, -1}, 20, 24, 16},
      {"one_wide", {0, 2, 3}, 3, 1, 1},
      {"no_depth", {0, 2, 3}, 4, 5, 0},
      {"no_columns", {0, 2, 3}, 3, 0, 4},
      {"no_rows", {0, 0, 0}, 0, 8, 8},
  };
}

template <typename T>
void check_gemm(const Shape& s, WeightLayout layout, bool biased, size_t offset, bool allow_tf32) {
  const int64_t num_experts = static_cast<int64_t>(s.offsets.size()) - 1;
  const auto input = random_values<T>(s.rows * s.k, 1), weight = random_values<T>(num_experts * s.n * s.k, 2);
  const auto bias = random_values<T>(num_experts * s.n, 3);
  const DeviceArray<T> d_input(input, offset), d_weight(weight, offset), d_bias(bias, offset);
  DeviceArray<T> d_output(s.rows * s.n, offset);
  const DeviceArray<int32_t> d_offsets(s.offsets);
  const GroupedGemmArgs args{d_output.data(),
                             d_input.data(),
                             d_weight.data(),
                             biased ? d_bias.data() : nullptr,
                             d_offsets.data(),
                             s.rows,
                             num_experts,
                             s.n,
                             s.k,
                             layout,
                             kDType<T>};
  if (!run_on_device([&](const CudaContext& cuda) { return grouped_gemm_cuda(args, cuda); }, allow_tf32)) return;
  const auto output = d_output.host();
  const auto offsets = clamped_offsets(s.offsets, s.rows);
  for (int64_t i = 0; i < s.rows * s.n; ++i) {
    const int64_t row = i / s.n, j = i % s.n, e = expert_of(offsets, row);
    Sum sum;
    if (e >= 0) {
      const T* w = weight.data() + e * s.n * s.k;
      for (int64_t x = 0; x < s.k; ++x) {
        sum.add(static_cast<double>(widen(input[row * s.k + x])) *
                widen(layout == WeightLayout::kOutIn ? w[j * s.k + x] : w[x * s.n + j]));
      }
      if (biased) sum.add(widen(bias[e * s.n + j]));
    }
    // tf32 keeps 11 bits of each operand.
    const bool close =
        allow_tf32 ? std::abs(widen(output[i]) - sum.value) <= 0x1p-9 * sum.magnitude : is_close(output[i], sum);
    if (!CHECK(close)) return;
    if (e < 0 && !CHECK(widen(output[i]) == 0)) return;
  }
}

template <typename T>
void check_wgrad(const Shape& s, bool accumulate, size_t offset, bool allow_tf32) {
  const int64_t num_experts = static_cast<int64_t>(s.offsets.size()) - 1, m = s.k, n = s.n;
  const auto lhs = random_values<T>(s.rows * m, 1), rhs = random_values<T>(s.rows * n, 2);
  const auto before = random_values<T>(num_experts * m * n, 3);
  const DeviceArray<T> d_lhs(lhs, offset), d_rhs(rhs, offset);
  DeviceArray<T> d_output(accumulate ? before : unwritten<T>(before.size()), offset);
  const DeviceArray<int32_t> d_offsets(s.offsets);
  const GroupedGemmWgradArgs args{
      d_output.data(), d_lhs.data(), d_rhs.data(), d_offsets.data(), s.rows, num_experts, m, n, kDType<T>, accumulate};
  if (!run_on_device([&](const CudaContext& cuda) { return grouped_gemm_wgrad_cuda(args, cuda); }, allow_tf32)) return;
  const auto output = d_output.host();
  const auto offsets = clamped_offsets(s.offsets, s.rows);
  for (int64_t i = 0; i < num_experts * m * n; ++i) {
    const int64_t e = i / (m * n), row = i / n % m, column = i % n;
    if (offsets[e] == offsets[e + 1]) {
      if (!CHECK(accumulate ? same_bits<T>({output[i]}, {before[i]}) : widen(output[i]) == 0)) return;
      continue;
    }
    Sum sum;
    for (int64_t r = offsets[e]; r < offsets[e + 1]; ++r) {
      sum.add(static_cast<double>(widen(lhs[r * m + row])) * widen(rhs[r * n + column]));
    }
    if (accumulate) sum.add(widen(before[i]));
    const bool close =
        allow_tf32 ? std::abs(widen(output[i]) - sum.value) <= 0x1p-9 * sum.magnitude : is_close(output[i], sum);
    if (!CHECK(close)) return;
  }
}

TEST(grouped_gemm_of_every_shape) {
  const Architecture a(80);
  for (const Shape& s : shapes()) {
    const Context c(s.name);
    for_each_type([&]<typename T>(std::type_identity<T>) {
      for (const WeightLayout layout : {WeightLayout::kOutIn, WeightLayout::kInOut}) {
        check_gemm<T>(s, layout, layout == WeightLayout::kInOut, 0, false);
      }
      check_wgrad<T>(s, false, 0, false);
      check_wgrad<T>(s, true, 0, false);
    });
  }
}

// What an sm_90 cannot do by TMA goes to the kernels of sm_80.
TEST(grouped_gemm_of_every_shape_on_sm90) {
  const Architecture a(90);
  for (const Shape& s : shapes()) {
    const Context c(s.name);
    check_gemm<BFloat16>(s, WeightLayout::kOutIn, true, 0, false);
    check_gemm<Float16>(s, WeightLayout::kInOut, false, 0, false);
    check_wgrad<BFloat16>(s, true, 0, false);
  }
}

// More than the threads that sort them.
TEST(grouped_gemm_of_many_experts) {
  const Architecture a(80);
  Shape s{"many_experts", std::vector<int32_t>(1501), 214, 3, 2};
  for (size_t e = 0; e < s.offsets.size(); ++e) s.offsets[e] = static_cast<int32_t>(e / 7);
  check_gemm<float>(s, WeightLayout::kOutIn, true, 0, false);
  check_gemm<BFloat16>(s, WeightLayout::kInOut, false, 0, false);
  check_wgrad<BFloat16>(s, false, 0, false);
}

TEST(grouped_gemm_of_addresses_between_pieces) {
  const std::vector<Shape> all = shapes();
  const Shape& s = *std::ranges::find(all, "tall", &Shape::name);
  for_each_type([&]<typename T>(std::type_identity<T>) {
    check_gemm<T>(s, WeightLayout::kOutIn, true, 1, false);
    check_wgrad<T>(s, true, 1, false);
  });
}

TEST(grouped_gemm_in_tf32) {
  for (const Shape& s : shapes()) {
    const Context c(s.name);
    check_gemm<float>(s, WeightLayout::kOutIn, false, 0, true);
    check_gemm<float>(s, WeightLayout::kInOut, true, 0, true);
    check_wgrad<float>(s, false, 0, true);
  }
}

TEST(grouped_gemm_kernel_names) {
  CHECK(gemm_kernel_name_cuda(90, DType::kBFloat16, 512, 64, 64, false) == "sm90_wgmma");
  CHECK(gemm_kernel_name_cuda(90, DType::kBFloat16, 65, 64, 64, false) == "sm90_wgmma");
  CHECK(gemm_kernel_name_cuda(90, DType::kBFloat16, 64, 64, 64, false) == "sm90_few_rows");
  CHECK(gemm_kernel_name_cuda(90, DType::kFloat16, 512, 64, 37, false) == "sm80_mma");
  CHECK(gemm_kernel_name_cuda(90, DType::kFloat16, 1, 64, 37, false) == "sm80_mma");
  CHECK(gemm_kernel_name_cuda(80, DType::kBFloat16, 512, 64, 64, false) == "sm80_mma");
  CHECK(gemm_kernel_name_cuda(100, DType::kBFloat16, 512, 64, 64, false) == "sm80_mma");
  CHECK(gemm_kernel_name_cuda(80, DType::kFloat32, 512, 64, 64, true) == "sm80_mma");
  CHECK(gemm_kernel_name_cuda(80, DType::kFloat32, 512, 64, 64, false) == "simt");
  CHECK(gemm_kernel_name_cuda(90, DType::kFloat64, 512, 64, 64, true) == "simt");
  CHECK(gemm_kernel_name_cuda(75, DType::kFloat32, 512, 64, 64, false).empty());
  for (const int architecture : {80, 86, 89, 90, 100, 120}) {
    for_each_type([&]<typename T>(std::type_identity<T>) {
      CHECK(!gemm_kernel_name_cuda(architecture, kDType<T>, 512, 37, 53, false).empty());
    });
  }
}

}  // namespace
}  // namespace moe::test
