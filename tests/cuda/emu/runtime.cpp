// The part of the CUDA runtime that the kernels' host code and the tests call. Launches are synchronous.
#include "emu/state.h"

namespace emu {
extern cudaError_t last_error;
extern std::unordered_map<const void*, size_t> smem_limits;

static bool bug_reached = false;
bool reached_bug() {
  bug_reached = true;
  return true;
}
bool was_bug_reached() { return bug_reached; }
}  // namespace emu

extern "C" {
// Leaks are not what is looked for, and abandoned launches leak.
__attribute__((visibility("default"))) const char* __asan_default_options() { return "detect_leaks=0"; }

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, enum cudaMemcpyKind) {
  if (bytes) memmove(to, from, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, enum cudaMemcpyKind kind, cudaStream_t) {
  return cudaMemcpy(to, from, bytes, kind);
}
cudaError_t cudaMemset(void* p, int value, size_t bytes) {
  if (bytes) memset(p, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) { return cudaMemset(p, value, bytes); }
cudaError_t cudaDeviceSynchronize() { return emu::last_error; }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return emu::last_error; }
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaPeekAtLastError() { return emu::last_error; }
cudaError_t cudaGetLastError() { return std::exchange(emu::last_error, cudaSuccess); }
const char* cudaGetErrorString(cudaError_t e) {
  return e == cudaSuccess ? "no error" : e == cudaErrorLaunchFailure ? "emulated launch failure" : "invalid launch";
}
cudaError_t cudaFuncSetAttribute(const void* kernel, enum cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value > static_cast<int>(emu::kSmemSize)) return emu::last_error = cudaErrorInvalidValue;
  emu::smem_limits[kernel] = static_cast<size_t>(value);
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes* a, const void*) {
  *a = {};
  a->maxThreadsPerBlock = 1024;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) {
  *blocks = 1;
  return cudaSuccess;
}
// EMU_SMS and EMU_ARCH: few multiprocessors, so that persistent kernels loop; sm_90 unless told otherwise.
cudaError_t cudaDeviceGetAttribute(int* value, enum cudaDeviceAttr attribute, int) {
  const int arch = emu::environment("EMU_ARCH", 90);
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = emu::environment("EMU_SMS", 3);
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = arch / 10;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = arch % 10;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = static_cast<int>(emu::kSmemSize);
      break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = static_cast<int>(emu::kSmemSize) + 1024;
      break;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      *value = 2048;
      break;
    case cudaDevAttrWarpSize:
      *value = 32;
      break;
    case cudaDevAttrL2CacheSize:
      *value = 50 << 20;
      break;
    default:
      *value = 0;
  }
  return cudaSuccess;
}
}
