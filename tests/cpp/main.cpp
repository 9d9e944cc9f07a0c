#include <cstring>

#include "check.h"
#include "moe/isa.h"

// Runs every test on every instruction set that this machine has; an argument selects the tests whose name holds it.
int main(int argc, char** argv) {
  using namespace moe::test;
  const char* filter = argc > 1 ? argv[1] : "";
  int count = 0;
  for (const std::string_view name : moe::available_isas()) {
    const std::string isa(name);
    moe::set_isa(isa);
    for (const auto& [test, run] : all_tests()) {
      if (std::strstr(test, filter) == nullptr) continue;
      const int before = failures;
      context = " " + isa + " " + test;
      run();
      std::printf("%-8s %-40s %s\n", isa.c_str(), test, failures == before ? "ok" : "FAILED");
      ++count;
    }
  }
  std::printf("%d tests, %d failed checks\n", count, failures);
  return count == 0 || failures != 0;  // a filter that selects nothing is a mistake
}
