// -fsanitize=thread makes the compiler call a function at every load and store. Here are those functions; the thread
// sanitizer's own library is not linked.
#include <unistd.h>

#include "emu/state.h"

namespace emu {

namespace {
const void* hook_pc = nullptr;
const Where kHookWhere = Where::current();

// The source line of hook_pc; of inlined frames the first in a kernel's file, as CUDA's headers are of no interest.
std::string hook_place() {
  char command[256], line[1024];
  snprintf(command, sizeof command, "addr2line -i -e /proc/%d/exe %p 2>/dev/null", getpid(),
           static_cast<const void*>(static_cast<const char*>(hook_pc) - 1));
  std::string place;
  if (FILE* f = popen(command, "r")) {
    while (fgets(line, sizeof line, f)) {
      line[strcspn(line, " \n")] = 0;
      const bool kernel = strstr(line, ".cu:") || strstr(line, ".cuh:");
      if (place.empty() || kernel) place = line;
      if (kernel) break;
    }
    pclose(f);
  }
  return place;
}
}  // namespace

Where hook_where() { return kHookWhere; }

std::string place(const Where& where) {
  if (where.file_name() == kHookWhere.file_name() && where.line() == kHookWhere.line()) return hook_place();
  return std::string(where.file_name()) + ":" + std::to_string(where.line());
}

std::string place_of_pc(const void* pc) {
  hook_pc = pc;
  return hook_place();
}

static void hook(const void* p, size_t bytes, bool write, size_t align, const void* pc) {
  if (current == nullptr) return;
  hook_pc = pc;
  if (reinterpret_cast<uintptr_t>(p) % align) fail(kHookWhere, "misaligned access of %zu bytes at %p", bytes, p);
  if (counts_banks) {
    const ptrdiff_t o = static_cast<const char*>(p) - current->block->arena;
    if (o >= 0 && o < static_cast<ptrdiff_t>(kSmemSize)) banks_access(current, pc, static_cast<uint32_t>(o), bytes);
  }
  race_pointer(p, bytes, write, kHookWhere);
}

}  // namespace emu

#define PC __builtin_return_address(0)
#define HOOKS(n)                                                            \
  void __tsan_read##n(void* p) { emu::hook(p, n, false, n, PC); }           \
  void __tsan_write##n(void* p) { emu::hook(p, n, true, n, PC); }           \
  void __tsan_unaligned_read##n(void* p) { emu::hook(p, n, false, 1, PC); } \
  void __tsan_unaligned_write##n(void* p) { emu::hook(p, n, true, 1, PC); } \
  void __tsan_volatile_read##n(void* p) { emu::hook(p, n, false, n, PC); }  \
  void __tsan_volatile_write##n(void* p) { emu::hook(p, n, true, n, PC); }
extern "C" {
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_read_range(void* p, size_t n) { emu::hook(p, n, false, 1, PC); }
void __tsan_write_range(void* p, size_t n) { emu::hook(p, n, true, 1, PC); }
char __tsan_atomic8_load(const volatile char* p, int) { return *p; }  // the guard of a static local
void __tsan_vptr_update(void*, void*) {}
void __tsan_vptr_read(void*) {}
}
