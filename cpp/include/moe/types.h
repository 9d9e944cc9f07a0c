// Words shared by every contract header: element types, status codes, and the host thread pool.
//
// Shape legend, used by all headers:
//   T num_tokens   H hidden_size   I intermediate_size   E num_experts   K top_k
//   R = T * K rows.  A slot is one (token, choice) pair, numbered token * K + k; a row is a place in expert order.
// All tensors are dense and row-major; the binding makes them contiguous before a call.
#pragma once

#include <cstddef>
#include <cstdint>

namespace moe {

enum class DType : int8_t { kFloat32, kBFloat16, kFloat16, kFloat64 };

constexpr size_t size_of(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }

// Kernels never print, abort or throw: they return a status, and the binding raises.
enum class Status : int8_t {
  kOk,
  kNonFiniteLogits,  // route with check_finite: a logit is NaN or infinite
  kOutOfMemory,      // scratch memory could not be allocated
  kImpossible,       // placement: sizes or loads that its contract rules out
  kCudaError,        // no kernel for this device or dtype, or a launch failed: CudaContext::report was told
};

// The caller's thread pool (torch's own, in the extension). Results never depend on num_threads.
struct ThreadPool {
  int (*num_threads)();
  // Calls task(begin, end, context) on disjoint ranges that cover [0, count), and returns when all are done.
  void (*run)(int64_t count, void (*task)(int64_t begin, int64_t end, void* context), void* context);
};

}  // namespace moe
