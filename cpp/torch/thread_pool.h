// torch's thread pool, as the kernels see it.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "moe/types.h"

namespace moe {

// torch's intra-op threads. A task does not throw, so neither call fails.
inline constexpr ThreadPool kTorchPool{
    .num_threads =
        [] {
          uint32_t threads = 1;
          torch_get_num_threads(&threads);
          return static_cast<int>(threads);
        },
    .run = [](int64_t count, void (*task)(int64_t, int64_t, void*),
              void* context) { torch_parallel_for(0, count, 1, task, context); },
};

}  // namespace moe
