// What the tests of kernels share: arrays on the device, a context, launches that must succeed. The same source runs in
// the emulator and, built by nvcc, on a GPU.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>
#include <vector>

#include "check.h"
#include "moe/cuda.h"

namespace moe::test {

inline void cuda_ok(cudaError_t error) { check(error == cudaSuccess, __FILE__, __LINE__, cudaGetErrorString(error)); }

// n elements on the device; every byte is set, so that what is not written is NaN (or -1) and shows. `shift` elements
// come before the first, for pointers that are aligned to no more than an element.
template <typename T>
class DeviceArray {
 public:
  explicit DeviceArray(size_t n, size_t shift = 0) : size_(n), shift_(shift) {
    cuda_ok(cudaMalloc(reinterpret_cast<void**>(&base_), (n + shift) * sizeof(T) + (n + shift == 0)));
    cuda_ok(cudaMemset(base_, 0xff, (n + shift) * sizeof(T)));
  }
  explicit DeviceArray(const std::vector<T>& values, size_t shift = 0) : DeviceArray(values.size(), shift) {
    if (!values.empty()) cuda_ok(cudaMemcpy(data(), values.data(), size_ * sizeof(T), cudaMemcpyHostToDevice));
  }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;
  ~DeviceArray() { cudaFree(base_); }

  T* data() { return base_ + shift_; }
  const T* data() const { return base_ + shift_; }
  size_t size() const { return size_; }
  std::vector<T> host() const {
    std::vector<T> values(size_);
    if (size_) cuda_ok(cudaMemcpy(values.data(), data(), size_ * sizeof(T), cudaMemcpyDeviceToHost));
    return values;
  }

 private:
  T* base_ = nullptr;
  size_t size_, shift_;
};

// A CudaContext on the default stream; scratch is freed with it, and what the kernels report is kept.
class DeviceContext {
 public:
  DeviceContext() = default;
  DeviceContext(const DeviceContext&) = delete;
  DeviceContext& operator=(const DeviceContext&) = delete;
  ~DeviceContext() {
    for (void* p : scratch_) cudaFree(p);
  }
  CudaContext get(bool allow_tf32 = false) {
    return {.stream = nullptr, .allocate = allocate, .report = report, .context = this, .allow_tf32 = allow_tf32};
  }
  const std::string& reported() const { return reported_; }

 private:
  static void* allocate(int64_t bytes, void* self) {
    void* p = nullptr;
    cuda_ok(cudaMalloc(&p, static_cast<size_t>(bytes)));
    static_cast<DeviceContext*>(self)->scratch_.push_back(p);
    return p;
  }
  static void report(const char* kernel, const char* error, void* self) {
    static_cast<DeviceContext*>(self)->reported_ += std::string(kernel) + ": " + error + "\n";
  }
  std::vector<void*> scratch_;
  std::string reported_;
};

// Calls run(const CudaContext&), which must succeed, and waits for the device.
template <typename Run>
bool run_on_device(const Run& run, bool allow_tf32 = false) {
  DeviceContext context;
  const Status status = run(context.get(allow_tf32));
  const cudaError_t error = cudaDeviceSynchronize();
  const bool ok = status == Status::kOk && error == cudaSuccess;
  check(ok, __FILE__, __LINE__, "launch failed: " + context.reported() + cudaGetErrorString(error));
  (void)cudaGetLastError();
  return ok;
}

// Every byte of an output is written exactly once while this lives; seen by the emulator's race build alone.
class WrittenOnce {
 public:
  WrittenOnce(const void* p, size_t bytes) : p_(p) {
    (void)bytes;
#ifdef CUDA_ON_CPU
    emu::expect_written_once(p, bytes);
#endif
  }
  template <typename T>
  explicit WrittenOnce(const DeviceArray<T>& a) : WrittenOnce(a.data(), a.size() * sizeof(T)) {}
  ~WrittenOnce() {
#ifdef CUDA_ON_CPU
    check(emu::check_written_once(p_), __FILE__, __LINE__, "an output byte was not written exactly once");
#endif
  }
  WrittenOnce(const WrittenOnce&) = delete;
  WrittenOnce& operator=(const WrittenOnce&) = delete;

 private:
  const void* p_;
};

}  // namespace moe::test
