// What device code and its tests see of the emulator: launches, barriers, warp collectives, shared memory, checks.
#pragma once

#include <source_location>

namespace emu {

// A place in the kernel's source; every message carries one.
using Where = std::source_location;

// ---- failures: the launch is abandoned and its error is cudaErrorLaunchFailure
[[noreturn]] void fail(const Where& where, const char* format, ...) __attribute__((format(printf, 2, 3)));

// ---- launches
struct Launch {
  dim3 grid, block;
  size_t smem = 0;
  cudaStream_t stream = nullptr;
  unsigned cluster = 1;
  bool overlap_previous = false;
};
void launch(const void* kernel, const char* name, const Launch& launch, const std::function<void()>& thread);

// Arguments are converted once, as by <<<>>>; each thread gets its own copy.
template <typename... P, typename... A>
void launch_kernel(void (*kernel)(P...), const char* name, const Launch& options, A&&... arguments) {
  const std::tuple<P...> parameters(static_cast<P>(arguments)...);
  launch(reinterpret_cast<const void*>(kernel), name, options, [&] { std::apply(kernel, parameters); });
}

// ---- planted bugs
constexpr uint64_t bug_id(const char* stage, int n) {
  uint64_t h = 1469598103934665603ull;
  for (; *stage; ++stage) h = (h ^ static_cast<uint64_t>(*stage)) * 1099511628211ull;
  return (h ^ static_cast<uint64_t>(n)) * 1099511628211ull;
}
extern uint64_t planted_bug;  // 0: none
bool reached_bug();           // true; notes that the bug's place was reached

// ---- scheduling
void yield();        // gives up the processor
void spin();         // the same, from a loop that waits for others
void yield_point();  // gives it up, sometimes

// ---- shared memory, by pointer and by the 32-bit addresses of the device
char* dynamic_smem();
char* static_smem(const void* tag, size_t bytes, size_t align, const Where& where = Where::current());
uint32_t smem_address(const void* p, const Where& where);

// ---- barriers
void bar_sync(int id, int threads, const Where& where);  // threads = -1: the whole block
void bar_arrive(int id, int threads, const Where& where);
int bar_reduce(int kind, int predicate, const Where& where);  // 0: count, 1: or, 2: and
void cluster_arrive(const Where& where);
void cluster_wait(const Where& where);
uint32_t cluster_rank();
uint32_t cluster_size();

// ---- warp collectives
// The lanes of `mask` gather; the last one calls finish(lanes, argument) for all. `what` and `where` must agree.
using Finish = void (*)(uint32_t lanes, void* const* argument, const Where& where);
enum class Lanes { kAny, kSameLine, kFullWarp };
void collective(const char* what, uint32_t mask, void* argument, Finish finish, Lanes lanes, const Where& where);
void syncwarp(uint32_t mask, const Where& where);

// ---- checks that a test asks for
// Every byte of [p, p + bytes) must be written exactly once from now to check_written_once(p), which returns whether it
// was and prints if not. Only the race build sees stores; elsewhere it returns true.
void expect_written_once(const void* p, size_t bytes);
bool check_written_once(const void* p);
// Shared-memory bank conflicts of ld.shared, st.shared, ldmatrix and stmatrix, per source line; race build.
void count_bank_conflicts(bool on);
struct BankCount {
  std::string where;
  uint64_t wavefronts, ideal;  // as executed, and the fewest possible for the bytes
};
std::vector<BankCount> bank_conflicts();

// ---- the seed of the next launches, and how many CUDA launches there were
void set_seed(uint64_t seed);
bool sees_memory_accesses();  // the race build

// ---- accesses that only the hooks of the race build and the emulated instructions report
void note_atomic(const void* p, size_t bytes);
void note_acquire(const void* p);  // of global memory, from other blocks
void note_release(const void* p);
void note_fence();
void grid_dependency_wait();

}  // namespace emu
