// Runs the tests of one program under several seeds (emulator) or once (GPU).
//
//   test_plan_race [word] [--seeds N] [--first S]     word: only the tests whose name holds it
//
// MOE_CUDA_SEEDS=N is the default of --seeds, and stronger than --default-seeds. With a bug planted (MOE_BUG=plan:3) it
// stops at the first failed check, and exits with 2 if no test came to the bug's place.
#include <chrono>
#include <cstdlib>
#include <cstring>

#include "check.h"

#ifdef CUDA_ON_CPU
namespace emu {
bool was_bug_reached();
}
#endif

int main(int argc, char** argv) {
  using namespace moe::test;
  const char* filter = "";
  const char* from_environment = std::getenv("MOE_CUDA_SEEDS");
  int seeds = from_environment != nullptr ? std::atoi(from_environment) : 1, first = 1;
  for (int i = 1; i < argc; ++i) {
    if (!std::strcmp(argv[i], "--seeds") && i + 1 < argc)
      seeds = std::atoi(argv[++i]);
    else if (!std::strcmp(argv[i], "--default-seeds") && i + 1 < argc)
      seeds = from_environment != nullptr ? seeds : std::atoi(argv[++i]), i += from_environment != nullptr;
    else if (!std::strcmp(argv[i], "--first") && i + 1 < argc)
      first = std::atoi(argv[++i]);
    else
      filter = argv[i];
  }
#ifndef CUDA_ON_CPU
  seeds = 1;
#endif
  const bool bug = std::getenv("MOE_BUG") != nullptr;
  stop_at_first_failure = bug;
  int count = 0;
  for (int seed = first; seed < first + seeds; ++seed)
    for (const auto& [test, run] : all_tests()) {
      if (std::strstr(test, filter) == nullptr) continue;
      context = " seed " + std::to_string(seed) + " " + test;
#ifdef CUDA_ON_CPU
      emu::set_seed(static_cast<uint64_t>(seed));
#endif
      const int before = failures;
      const auto start = std::chrono::steady_clock::now();
      run();
      ++count;
      const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
      std::printf("seed %-4d %-40s %6.2f s%s\n", seed, test, seconds.count(), failures == before ? "" : "  FAILED");
    }
  std::printf("%d tests, %d failed checks\n", count, failures);
#ifdef CUDA_ON_CPU
  if (bug && !emu::was_bug_reached()) {
    std::printf("no test came to the place of %s\n", std::getenv("MOE_BUG"));
    return 2;
  }
#endif
  return count == 0 || failures != 0;
}
