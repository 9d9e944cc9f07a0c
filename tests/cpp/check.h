// Tests that register themselves, and checks that say where they are.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

namespace moe::test {

struct Test {
  const char* name;
  void (*run)();
};

inline std::vector<Test>& all_tests() {
  static std::vector<Test> tests;
  return tests;
}

struct Registration {
  Registration(const char* name, void (*run)()) { all_tests().push_back({name, run}); }
};

inline int failures = 0;
inline bool stop_at_first_failure = false;
inline std::string context;  // the case at hand, printed with a failure

// Adds a word to `context` while it lives.
class Context {
 public:
  explicit Context(const std::string& word) : size_(context.size()) { context += " " + word; }
  ~Context() { context.resize(size_); }

 private:
  size_t size_;
};

inline bool check(bool ok, const char* file, int line, const std::string& text) {
  if (!ok && ++failures <= 20) std::printf("%s:%d:%s: %s\n", file, line, context.c_str(), text.c_str());
  if (!ok && stop_at_first_failure) std::exit(1);
  return ok;
}

}  // namespace moe::test

#define TEST(name)                                                            \
  static void test_##name();                                                  \
  static const ::moe::test::Registration register_##name(#name, test_##name); \
  static void test_##name()
#define CHECK(condition) ::moe::test::check((condition), __FILE__, __LINE__, #condition)
