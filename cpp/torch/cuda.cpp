// Registers every operator for CUDA. Nothing of libtorch_cuda is linked, so that this extension also loads into a torch
// without CUDA: the current stream is asked for through a function that is looked up at the first call.
//
// A build without nvcc registers the same operators to say what is missing.
#include "register_ops.h"

#ifdef MOE_CUDA_VERSION
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/stable/accelerator.h>

#include <exception>
#include <optional>
#include <string>
#include <vector>
#endif

namespace moe {
namespace {

#ifdef MOE_CUDA_VERSION

constexpr int kOldestMajor = 8;  // the tensor core instructions and asynchronous copies of Ampere

using CurrentStream = AOTITorchError (*)(int32_t device_index, void** stream);

CurrentStream find_current_stream() {
  // NOLOAD: torch loaded it when it was imported, or has none. The second is for a torch linked into one library.
  for (const char* library : {"libtorch_cuda.so", static_cast<const char*>(nullptr)}) {
    void* handle = dlopen(library, RTLD_LAZY | RTLD_NOLOAD);
    if (!handle) continue;
    if (void* function = dlsym(handle, "aoti_torch_get_current_cuda_stream")) {
      return reinterpret_cast<CurrentStream>(function);
    }
  }
  return nullptr;
}

// torch.backends.cuda.matmul.fp32_precision, which the older allow_tf32 and set_float32_matmul_precision set, too. The
// stable functions do not tell; asked only where operands are fp32.
bool torch_allows_tf32() {
  const pybind11::gil_scoped_acquire gil;
  const pybind11::object matmul = pybind11::module_::import("torch.backends.cuda").attr("matmul");
  return matmul.attr("fp32_precision").cast<std::string>() == "tf32";
}

std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

// One operator call: the tensors' device is current while it lives, and its scratch memory is in use until it dies.
class Cuda {
 public:
  explicit Cuda(const Tensor& first) : first_(first) {}

  Status run(const RouteArgs& args) { return args.options.check_finite ? run_checked(args) : queue(route_cuda, args); }
  Status run(const RouteBackwardArgs& args) { return queue(route_backward_cuda, args); }
  Status run(const PlanArgs& args) { return queue(plan_cuda, args); }
  Status run(const PermuteArgs& args) { return queue(permute_cuda, args); }
  Status run(const GroupedGemmArgs& args) { return queue(grouped_gemm_cuda, args, args.dtype); }
  Status run(const GroupedGemmWgradArgs& args) { return queue(grouped_gemm_wgrad_cuda, args, args.dtype); }
  Status run(const GroupedGemmBgradArgs& args) { return queue(grouped_gemm_bgrad_cuda, args); }
  Status run(const ActivationArgs& args) { return queue(activation_cuda, args); }
  Status run(const ActivationBackwardArgs& args) { return queue(activation_backward_cuda, args); }
  Status run(const CombineArgs& args) { return queue(combine_cuda, args); }
  Status run(const CombineBackwardArgs& args) { return queue(combine_backward_cuda, args); }
  Status run(const ExpertsArgs& args) { return queue(experts_cuda, args, args.layer.dtype); }
  Status run(const RoutedExpertsArgs& args) { return queue(routed_experts_cuda, args, args.experts.layer.dtype); }
  Status run(const ExpertsBackwardArgs& args) { return queue(experts_backward_cuda, args, args.layer.dtype); }
  Status run(const EpPlanArgs& args) { return queue(ep_plan_cuda, args); }
  Status run(const EpPackArgs& args) { return queue(ep_pack_cuda, args); }
  Status run(const EpIndexArgs& args) { return queue(ep_index_cuda, args); }
  Status run(const EpReduceArgs& args) { return queue(ep_reduce_cuda, args); }

  const std::string& failure() const { return failure_; }

 private:
  // `product` is the dtype of the matrix products in the call, if it has any.
  template <typename Args>
  Status queue(Status (*kernels)(const Args&, const CudaContext&), const Args& args, DType product = DType::kFloat64) {
    if (!prepare()) return Status::kCudaError;
    const bool allow_tf32 = product == DType::kFloat32 && torch_allows_tf32();
    return kernels(args,
                   {.stream = stream_,
                    .allocate = [](int64_t bytes, void* self) { return static_cast<Cuda*>(self)->allocate(bytes); },
                    .report = [](const char* kernel, const char* error,
                                 void* self) { static_cast<Cuda*>(self)->report(kernel, error); },
                    .context = this,
                    .allow_tf32 = allow_tf32});
  }

  // An error that is found on the device is raised by the host: the one case in which a call waits for its stream.
  Status run_checked(RouteArgs args) {
    args.non_finite = static_cast<int32_t*>(allocate(sizeof(int32_t)));
    if (!args.non_finite) return Status::kOutOfMemory;
    if (const Status status = queue(route_cuda, args); status != Status::kOk) return status;
    int32_t found = 0;
    const cudaStream_t stream = static_cast<cudaStream_t>(stream_);
    cudaError_t error = cudaMemcpyAsync(&found, args.non_finite, sizeof(found), cudaMemcpyDeviceToHost, stream);
    if (error == cudaSuccess) error = cudaStreamSynchronize(stream);
    if (error != cudaSuccess) {
      (void)cudaGetLastError();  // or the next call would find it
      report("route", cudaGetErrorString(error));
      return Status::kCudaError;
    }
    return found ? Status::kNonFiniteLogits : Status::kOk;
  }

  // Makes the tensors' device current and finds its stream.
  bool prepare() {
    static const CurrentStream current_stream = find_current_stream();
    if (!current_stream) {
      failure_ = "found no aoti_torch_get_current_cuda_stream in this torch (install torch >= 2.10 built with CUDA)";
      return false;
    }
    const int device = first_.get_device_index();
    guard_.emplace(device);
    // The runtime in this library is another copy than torch's, and has its own notion of the current device.
    if (const cudaError_t error = cudaSetDevice(device); error != cudaSuccess) return refuse_driver(error);
    int major = 0, minor = 0;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    if (major < kOldestMajor) {
      failure_ = "needs a GPU of compute capability 8.0 or newer, got cuda:" + std::to_string(device) + " with " +
                 std::to_string(major) + "." + std::to_string(minor) + " (move the tensors to the CPU)";
      return false;
    }
    TORCH_ERROR_CODE_CHECK(current_stream(device, &stream_));
    return true;
  }

  bool refuse_driver(cudaError_t error) {
    (void)cudaGetLastError();
    failure_ = std::string("the CUDA runtime does not start: ") + cudaGetErrorString(error);
    int driver = 0;
    if (error == cudaErrorInsufficientDriver && cudaDriverGetVersion(&driver) == cudaSuccess) {
      failure_ += "; the driver knows CUDA " + version_text(driver) + ", the kernels were built by nvcc " +
                  MOE_CUDA_VERSION + " (update the driver, or build with an nvcc of its version)";
    }
    return false;
  }

  // Memory of torch's allocator, which hands it on in the order of the stream: it may be released before it is used.
  void* allocate(int64_t bytes) {
    try {
      scratch_.push_back(torch::stable::new_empty(first_, {bytes > 0 ? bytes : 1}, ScalarType::Byte));
      return scratch_.back().mutable_data_ptr();
    } catch (const std::exception& error) {  // must not pass through the kernels' host code
      failure_ = error.what();
      return nullptr;
    }
  }

  void report(const char* kernel, const char* error) {
    failure_ = std::string("CUDA kernel ") + kernel + " could not run: " + error;
  }

  const Tensor& first_;
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  void* stream_ = nullptr;  // a cudaStream_t
  std::vector<Tensor> scratch_;
  std::string failure_;
};

#else

struct Cuda {
  explicit Cuda(const Tensor&) {}
  template <typename Args>
  Status run(const Args&) {
    return Status::kCudaError;
  }
  std::string failure() const {
    return "this build of torch-moe has no CUDA kernels (build it again with nvcc >= 12.4 on the PATH: "
           "pip install --no-build-isolation ., or move the tensors to the CPU)";
  }
};

#endif

STABLE_TORCH_LIBRARY_IMPL(moe, CUDA, m) { register_ops<Cuda>(m); }

}  // namespace
}  // namespace moe
