#include <cstring>

#include "check.h"

#if __has_include("gemm/kernels.h")
#include "gemm/kernels.h"
#define MOE_ISAS 1
#endif

namespace {

int run_all(const char* isa, const char* filter) {
  int count = 0;
  for (const auto& [name, run] : moe::test::all_tests()) {
    if (std::strstr(name, filter) == nullptr) continue;
    const int before = moe::test::failures;
    moe::test::context = std::string(" ") + isa + " " + name;
    run();
    std::printf("%-8s %-40s %s\n", isa, name, moe::test::failures == before ? "ok" : "FAILED");
    ++count;
  }
  return count;
}

}  // namespace

int main(int argc, char** argv) {
  const char* filter = argc > 1 ? argv[1] : "";
  int count = 0;
#ifdef MOE_ISAS
  // Every test on every instruction set that this machine has.
  const char* names[8];
  const int isas = moe::available_isas(names, 8);
  for (int i = 0; i < isas; ++i) {
    moe::set_isa(names[i]);
    count += run_all(names[i], filter);
  }
#else
  count = run_all("plain", filter);
#endif
  std::printf("%d tests, %d failed checks\n", count, moe::test::failures);
  return count == 0 || moe::test::failures != 0;  // a filter that selects nothing is a mistake
}
