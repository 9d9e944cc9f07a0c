// A product by one of the sm_90a kernels against sums in double, with any epilogue. What the tests of those kernels
// share.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <numeric>
#include <random>

#include "check.h"
#include "emulated_gpu.h"
#include "grouped_gemm.cuh"

namespace moe::test {

using cuda::Epilogue;

// Device memory that starts as NaN and is freed with its owner.
class Device {
 public:
  explicit Device(size_t bytes) : bytes_(bytes) {
    CHECK(cudaMalloc(&data_, std::max<size_t>(bytes, 1)) == cudaSuccess);
    CHECK(cudaMemset(data_, 0xff, bytes) == cudaSuccess);
  }
  template <typename T>
  explicit Device(const std::vector<T>& values) : Device(values.size() * sizeof(T)) {
    CHECK(cudaMemcpy(data_, values.data(), bytes_, cudaMemcpyHostToDevice) == cudaSuccess);
  }
  Device(const Device&) = delete;
  ~Device() { (void)cudaFree(data_); }
  template <typename T>
  std::vector<T> read() const {
    std::vector<T> values(bytes_ / sizeof(T));
    CHECK(cudaMemcpy(values.data(), data_, bytes_, cudaMemcpyDeviceToHost) == cudaSuccess);
    return values;
  }
  void* data() const { return data_; }

 private:
  void* data_ = nullptr;
  size_t bytes_;
};

inline std::vector<Device*> scratch;
inline CudaContext context_of_test() {
  return {.stream = nullptr,
          .allocate =
              [](int64_t bytes, void*) {
                scratch.push_back(new Device(static_cast<size_t>(bytes)));
                return scratch.back()->data();
              },
          .report = [](const char* kernel, const char* error, void*) { std::printf("%s: %s\n", kernel, error); },
          .context = nullptr,
          .allow_tf32 = false};
}
inline void free_scratch() {
  for (Device* device : scratch) delete device;
  scratch.clear();
}

inline double widen(__nv_bfloat16 x) { return __bfloat162float(x); }
inline double widen(__half x) { return __half2float(x); }
template <typename T>
T narrow(double x) {
  if constexpr (std::is_same_v<T, __half>)
    return __float2half_rn(static_cast<float>(x));
  else
    return __float2bfloat16_rn(static_cast<float>(x));
}
template <typename T>
constexpr double kEps = std::is_same_v<T, __half> ? 0x1p-11 : 0x1p-8;
template <typename T>
constexpr DType kDType = std::is_same_v<T, __half> ? DType::kFloat16 : DType::kBFloat16;

template <typename T>
std::vector<T> normal(int64_t n, double scale, uint32_t seed) {
  std::mt19937 engine(seed);
  std::normal_distribution<double> distribution(0, scale);
  std::vector<T> values(static_cast<size_t>(n));
  for (T& value : values) value = narrow<T>(distribution(engine));
  return values;
}

// The activation and its derivatives with respect to gate and up, in double.
struct Reference {
  double value, gate, up;
};
inline Reference activation_of(const ActivationOptions& o, double g, double u) {
  const bool gated = is_gated(o.activation);
  const double clamped = gated ? std::min(g, o.limit) : g;
  const auto scalar = [&](double x) {
    switch (o.activation) {
      case Activation::kSwiGLU:
      case Activation::kSiLU: {
        const double alpha = o.activation == Activation::kSwiGLU ? o.alpha : 1;
        return x / (1 + std::exp(-alpha * x));
      }
      case Activation::kGeGLU:
      case Activation::kGELU:
        return x * 0.5 * std::erfc(-x * std::sqrt(0.5));
      case Activation::kGeGLUTanh:
      case Activation::kGELUTanh:
        return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
      case Activation::kReGLU:
      case Activation::kReLU:
        return std::max(x, 0.0);
      default:
        return std::max(x, 0.0) * std::max(x, 0.0);
    }
  };
  constexpr double kStep = 1e-5;
  const double value = scalar(clamped), slope = (scalar(clamped + kStep) - scalar(clamped - kStep)) / (2 * kStep);
  if (!gated) return {value, slope, 0};
  const double factor = std::clamp(u, -o.limit, o.limit) + o.up_offset;
  return {value * factor, g > o.limit ? 0 : slope * factor, std::abs(u) > o.limit ? 0 : value};
}

struct Case {
  const char* name;
  std::vector<int> rows;  // of each expert
  int64_t n, k;           // n: columns of the weight
  WeightLayout layout = WeightLayout::kOutIn;
  bool gather = false, bias = false;
  Epilogue epilogue = Epilogue::kStore;
  ActivationOptions activation{Activation::kSwiGLU, GateLayout::kConcat, 1, INFINITY, 0};
  int rows_outside = 0;  // past the last expert
  int64_t tile_rows = 128;
  bool in_place = false;  // the backward overwrites what was saved
  Status (*gemm)(const cuda::GemmTask&, const CudaContext&) = cuda::gemm_sm90;
  int times = 1;  // that the product is computed with one schedule
};

constexpr int kTopK = 2;

// The plan of a case, in expert order, with slots that are none.
struct Rows {
  std::vector<int32_t> offsets{0}, row_to_slot;
  int total = 0, tokens = 0;
  explicit Rows(const Case& c) {
    for (const int rows : c.rows) offsets.push_back(total += rows);
    total += c.rows_outside;
    tokens = (total + kTopK - 1) / kTopK;
    row_to_slot.resize(total);
    std::iota(row_to_slot.begin(), row_to_slot.end(), 0);
    std::shuffle(row_to_slot.begin(), row_to_slot.end(), std::mt19937(7));
    if (total > 4) row_to_slot[1] = -1, row_to_slot[3] = kTopK * tokens, row_to_slot[4] = INT32_MIN;
  }
  int slot(int r) const { return row_to_slot[r] >= 0 && row_to_slot[r] < kTopK * tokens ? row_to_slot[r] : -1; }
  int source(const Case& c, int r) const { return !c.gather ? r : slot(r) < 0 ? -1 : slot(r) / kTopK; }
};

// A number that the kernel stores as T: rounded once, after fp32 arithmetic on terms of this magnitude.
template <typename T>
void check_close(double got, double expected, double magnitude, const char* what, int r, int64_t column) {
  const double bound = 1.01 * kEps<T> * std::abs(expected) + 0x1p-18 * magnitude + 0x1p-24;
  if (std::abs(got - expected) <= bound) return;
  check(false, __FILE__, __LINE__,
        std::string(what) + "[" + std::to_string(r) + "][" + std::to_string(column) + "] is " + std::to_string(got) +
            ", not " + std::to_string(expected));
}

template <typename T>
struct Outputs {
  std::vector<T> output;
  std::vector<float> partials;
};

template <typename T>
Outputs<T> run(const Case& c) {
  const Context word(std::string(c.name) + (std::is_same_v<T, __half> ? " fp16" : " bf16"));
  const Rows rows(c);
  const int64_t e = static_cast<int64_t>(c.rows.size()), r = rows.total;
  const bool forward = c.epilogue == Epilogue::kActivation, backward = c.epilogue == Epilogue::kActivationBackward;
  const bool gated = is_gated(c.activation.activation);
  const bool concat = gated && c.activation.gate_layout == GateLayout::kConcat;
  const int64_t width = forward && gated ? c.n / 2 : c.n;       // of the output
  const int64_t pre_width = backward && gated ? 2 * c.n : c.n;  // of the pre-activations
  const auto x = normal<T>((c.gather ? rows.tokens : r) * c.k, 1, 1);
  const auto w = normal<T>(e * c.n * c.k, 1 / std::sqrt(static_cast<double>(c.k)), 2);
  const auto b = normal<T>(e * c.n, 1, 3);
  const auto h = normal<T>(r * pre_width, 2, 4);
  std::vector<float> s(kTopK * rows.tokens);
  for (size_t i = 0; i < s.size(); ++i) s[i] = 0.25f + static_cast<float>(i % 7) / 8;

  const Device dx(x), dw(w), db(b), dh(h), ds(s), offsets(rows.offsets), row_to_slot(rows.row_to_slot);
  const Device output(r * width * sizeof(T)), pre(r * pre_width * sizeof(T));
  const Device partials(r * cuda::gemm_partials(c.n) * sizeof(float));
  const CudaContext context = context_of_test();
  cuda::GemmTask task{};
  task.output = output.data();
  if (forward) task.pre_activation = pre.data();
  if (backward) {
    task.grad_pre_activation = c.in_place ? dh.data() : pre.data();
    task.partial_grad_weights = partials.data();
    task.saved_pre_activation = dh.data();
    task.row_weights = ds.data();
  }
  task.rows = dx.data();
  if (c.gather) task.gather = {static_cast<const int32_t*>(row_to_slot.data()), kTopK * rows.tokens, kTopK};
  task.weight = dw.data();
  if (c.bias) task.bias = db.data();
  task.num_rows = r, task.num_experts = e, task.n = c.n, task.k = c.k;
  task.weight_layout = c.layout, task.dtype = kDType<T>;
  task.epilogue = c.epilogue, task.activation = c.activation;
  CHECK(cuda::make_schedule(static_cast<const int32_t*>(offsets.data()), r, e, c.tile_rows, context, &task.schedule) ==
        Status::kOk);
  for (int i = 0; i < c.times; ++i) {
    CHECK(cudaMemset(output.data(), 0xff, r * width * sizeof(T)) == cudaSuccess);
    CHECK(c.gemm(task, context) == Status::kOk);
  }
  CHECK(cudaDeviceSynchronize() == cudaSuccess);
  free_scratch();

  const auto got = output.read<T>(), got_pre = (c.in_place ? dh : pre).template read<T>();
  const auto got_partials = partials.read<float>();
  int expert = 0;
  for (int i = 0; i < r; ++i) {
    while (expert < e && i >= rows.offsets[expert + 1]) ++expert;
    const int source = rows.source(c, i);
    std::vector<double> sums(c.n, 0), magnitudes(c.n, 0);
    for (int64_t n = 0; n < c.n && expert < e; ++n) {
      if (c.bias) sums[n] = widen(b[expert * c.n + n]), magnitudes[n] = std::abs(sums[n]);
      for (int64_t k = 0; k < c.k && source >= 0; ++k) {
        const int64_t at =
            c.layout == WeightLayout::kOutIn ? (expert * c.n + n) * c.k + k : (expert * c.k + k) * c.n + n;
        const double term = widen(w[at]) * widen(x[source * c.k + k]);
        sums[n] += term, magnitudes[n] += std::abs(term);
      }
    }
    if (backward) {
      const double weight = c.gather ? (rows.slot(i) < 0 ? 0 : s[rows.slot(i)]) : s[i];
      std::vector<double> dot(cuda::gemm_partials(c.n), 0), dot_magnitude = dot;
      for (int64_t n = 0; n < c.n; ++n) {
        const int64_t g = i * pre_width + (!gated || concat ? n : 2 * n), u = g + (concat ? c.n : 1);
        if (expert == e) {
          check_close<T>(widen(got[i * width + n]), 0, 0, "output outside", i, n);
          check_close<T>(widen(got_pre[g]), 0, 0, "gradient outside", i, n);
          continue;
        }
        const Reference a = activation_of(c.activation, widen(h[g]), gated ? widen(h[u]) : 0);
        const double size = magnitudes[n] * (1 + std::abs(a.gate) + std::abs(a.up)) + std::abs(a.value);
        check_close<T>(widen(got[i * width + n]), weight * a.value, size, "output", i, n);
        check_close<T>(widen(got_pre[g]), weight * sums[n] * a.gate, size, "gate gradient", i, n);
        if (gated) check_close<T>(widen(got_pre[u]), weight * sums[n] * a.up, size, "up gradient", i, n);
        dot[n / cuda::kPartialColumns] += sums[n] * a.value;
        dot_magnitude[n / cuda::kPartialColumns] += magnitudes[n] * (std::abs(a.value) + 0.1);
      }
      for (size_t p = 0; p < dot.size() && expert < e; ++p) {
        const double at = got_partials[i * dot.size() + p];
        if (!(std::abs(at - dot[p]) <= 0x1p-18 * dot_magnitude[p])) check_close<T>(at, 1e30, 0, "partial", i, p);
      }
      continue;
    }
    for (int64_t n = 0; n < c.n; ++n) {
      if (forward) check_close<T>(widen(got_pre[i * c.n + n]), sums[n], magnitudes[n], "pre-activation", i, n);
      if (n >= width) continue;
      if (!forward) {
        check_close<T>(widen(got[i * width + n]), sums[n], magnitudes[n], "output", i, n);
        continue;
      }
      const int64_t g = !gated || concat ? n : 2 * n, u = gated ? g + (concat ? width : 1) : g;
      const Reference a = activation_of(c.activation, sums[g], sums[u]);
      check_close<T>(widen(got[i * width + n]), expert < e ? a.value : 0,
                     (magnitudes[g] + magnitudes[u]) * (1 + std::abs(a.gate) + std::abs(a.up)), "activation", i, n);
    }
  }
  return {got, got_partials};
}

inline void run_both(const Case& c) {
  run<__nv_bfloat16>(c);
  run<__half>(c);
}

constexpr WeightLayout kInOut = WeightLayout::kInOut;
constexpr ActivationOptions kGptOss{Activation::kSwiGLU, GateLayout::kInterleaved, 1.702, 1.5, 1};

}  // namespace moe::test
