// cuda: what a CUDA operator takes from its caller. Like ThreadPool for the CPU: the core never asks torch for
// anything.
//
// Every <stage>_cuda function only queues kernels on `stream`: it never waits for the device and never reads its
// memory, so that a call can be captured in a CUDA graph. The device is the current one; the caller sets it.
#pragma once

#include "moe/types.h"

namespace moe {

struct CudaContext {
  void* stream;  // a cudaStream_t
  // Scratch on the device, 256-byte aligned, uninitialised; valid for everything that this call queues on `stream`.
  // Null when there is none.
  void* (*allocate)(int64_t bytes, void* context);
  // Told which kernel could not be launched and why, once, before kCudaError is returned.
  void (*report)(const char* kernel, const char* error, void* context);
  void* context;
  // fp32 matrix products may round their operands to tf32 (torch.backends.cuda.matmul.allow_tf32).
  bool allow_tf32;
};

}  // namespace moe
