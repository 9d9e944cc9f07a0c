// How the zoo looks at its animals: each wrong kernel runs in a process of its own, because sanitizers and the watchdog
// end theirs, and the test reads what it said.
#pragma once

#include <sys/wait.h>
#include <unistd.h>

#include <string>

#include "device.h"
#include "ptx/ptx.cuh"

namespace moe::test::zoo {

namespace ptx = cuda::ptx;

__device__ inline int thread() { return static_cast<int>(threadIdx.x); }
__device__ inline uint32_t barrier_at(float* s) { return ptx::smem_u32(s); }

#if defined(__SANITIZE_ADDRESS__)
constexpr bool kSanitizes = true;
#else
constexpr bool kSanitizes = false;
#endif

struct Report {
  bool failed;
  std::string text;
};

// Runs a launch in a child process.
template <typename Run>
Report report_of(const Run& run) {
  int ends[2];
  if (pipe(ends) != 0) std::abort();
  std::fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    dup2(ends[1], 2);
    close(ends[0]);
    run();
    const bool failed = cudaGetLastError() != cudaSuccess;
    std::fflush(stderr);
    _exit(failed ? 10 : 0);
  }
  close(ends[1]);
  std::string text;
  char part[4096];
  for (ssize_t n; (n = read(ends[0], part, sizeof part)) > 0;) text.append(part, static_cast<size_t>(n));
  close(ends[0]);
  int status = 0;
  waitpid(child, &status, 0);
  return {status != 0, text};
}

// What the emulator must say, by what it is built for; null: it need not notice.
struct Words {
  const char *fast, *asan, *race;
  const char* here() const { return kSanitizes ? asan : emu::sees_memory_accesses() ? race : fast; }
};
constexpr Words always(const char* words) { return {words, words, words}; }
constexpr Words only_race(const char* words) { return {nullptr, nullptr, words}; }
constexpr Words only_asan(const char* words) { return {nullptr, words, nullptr}; }

constexpr int kFloats = 128;  // of the buffer that every kernel gets

struct Shape {
  unsigned blocks = 1, threads = 64;
  size_t smem = 4 * kFloats;
  unsigned cluster = 1;
  bool overlaps = false;  // a kernel that writes the buffer, which is on its way when this one starts
};

inline __global__ void write_buffer(float* g) { g[thread()] = 1; }

inline Report launch(void (*kernel)(float*), const Shape& shape) {
  DeviceArray<float> g(kFloats);
  return report_of([&] {
    if (shape.overlaps) LAUNCH(write_buffer, 1, kFloats, 0, nullptr, g.data());
    LAUNCH_EX(kernel,
              (cuda::ptx::Launch{shape.blocks, shape.threads, shape.smem, nullptr, shape.cluster, shape.overlaps}),
              g.data());
  });
}

inline void expect(const char* name, void (*kernel)(float*), const Words& words, const Shape& shape = {}) {
  const Context c(name);
  const Report report = launch(kernel, shape);
  const char* expected = words.here();
  if (expected == nullptr) return;
  check(report.failed && report.text.find(expected) != std::string::npos, __FILE__, __LINE__,
        std::string("expected '") + expected + "', got: " + (report.text.empty() ? "nothing" : report.text));
}

inline void expect_silence(const char* name, void (*kernel)(float*), const Shape& shape = {}) {
  const Context c(name);
  const Report report = launch(kernel, shape);
  check(!report.failed && report.text.empty(), __FILE__, __LINE__, "false alarm: " + report.text);
}

}  // namespace moe::test::zoo
