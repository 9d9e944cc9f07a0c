// Which GPU the emulator plays, so that the kernels of each architecture are chosen. A real GPU stays what it is.
#pragma once

#include <cstdlib>
#include <string>

namespace moe::test {

class Architecture {
 public:
  explicit Architecture([[maybe_unused]] int architecture) {
#ifdef CUDA_ON_CPU
    setenv("EMU_ARCH", std::to_string(architecture).c_str(), 1);
#endif
  }
  ~Architecture() {
#ifdef CUDA_ON_CPU
    unsetenv("EMU_ARCH");
#endif
  }
  Architecture(const Architecture&) = delete;
  Architecture& operator=(const Architecture&) = delete;
};

}  // namespace moe::test
