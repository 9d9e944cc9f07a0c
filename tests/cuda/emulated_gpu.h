// Which GPU the emulator plays. A real GPU stays what it is.
#pragma once

#include <cstdlib>
#include <string>

namespace moe::test {

// A property of the emulated GPU for as long as this lives.
class EmulatedGpu {
 public:
  EmulatedGpu(const EmulatedGpu&) = delete;
  EmulatedGpu& operator=(const EmulatedGpu&) = delete;

 protected:
  EmulatedGpu(const char* variable, [[maybe_unused]] int value) : variable_(variable) {
#ifdef CUDA_ON_CPU
    setenv(variable_, std::to_string(value).c_str(), 1);
#endif
  }
  ~EmulatedGpu() {
#ifdef CUDA_ON_CPU
    unsetenv(variable_);
#endif
  }

 private:
  [[maybe_unused]] const char* variable_;
};

// 80 or 90, so that the kernels of each are chosen.
struct Architecture : EmulatedGpu {
  explicit Architecture(int architecture) : EmulatedGpu("EMU_ARCH", architecture) {}
};

// With more multiprocessors than tiles, tiles are split.
struct Multiprocessors : EmulatedGpu {
  explicit Multiprocessors(int count) : EmulatedGpu("EMU_SMS", count) {}
};

}  // namespace moe::test
