// Fibers: a stack per CUDA thread, and the switch between two of them in a dozen instructions (ucontext would make a
// system call each time).
#include <pthread.h>
#include <sys/mman.h>

#include "emu/state.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define ASAN 1
#else
#define ASAN 0
#endif

#if !defined(__x86_64__)
#error "switch_stacks is written for x86-64"
#endif
extern "C" void emu_switch_stacks(void** save, void* to);
asm(R"(
.text
.globl emu_switch_stacks
.type emu_switch_stacks,@function
emu_switch_stacks:
  .cfi_startproc
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .cfi_endproc
)");

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emu {

Fiber* current = nullptr;

namespace {

constexpr size_t kStack = ASAN ? 512 << 10 : 128 << 10, kGuard = 4096;
std::vector<char*> free_stacks;
Fiber scheduler;

#if ASAN
void stack_of(const Fiber* f, const void*& bottom, size_t& size) {
  if (f != &scheduler) {
    bottom = f->stack;
    size = kStack;
    return;
  }
  static const void* main_bottom;
  static size_t main_size;
  if (main_bottom == nullptr) {
    pthread_attr_t attributes;
    pthread_getattr_np(pthread_self(), &attributes);
    void* p;
    pthread_attr_getstack(&attributes, &p, &main_size);
    pthread_attr_destroy(&attributes);
    main_bottom = p;
  }
  bottom = main_bottom;
  size = main_size;
}
#endif

void switch_stacks(Fiber* from, Fiber* to, [[maybe_unused]] bool dying) {
#if ASAN
  const void* bottom;
  size_t size;
  stack_of(to, bottom, size);
  __sanitizer_start_switch_fiber(dying ? nullptr : &from->asan_stack, bottom, size);
#endif
  emu_switch_stacks(&from->stack_pointer, to->stack_pointer);
#if ASAN
  __sanitizer_finish_switch_fiber(from->asan_stack, nullptr, nullptr);
#endif
}

void first_function() {
#if ASAN
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
  thread_main();
}

}  // namespace

void switch_to(Fiber* fiber) {
  Fiber* from = current != nullptr ? current : &scheduler;
  current = fiber;
  threadIdx = fiber->index;
  blockIdx = fiber->block->index;
  switch_stacks(from, fiber, false);
}

void switch_to_scheduler(bool dying) {
  Fiber* from = current;
  current = nullptr;
  switch_stacks(from, &scheduler, dying);
}

void create_stack(Fiber& fiber) {
  if (free_stacks.empty()) {
    char* p = static_cast<char*>(
        mmap(nullptr, kStack + kGuard, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (p == MAP_FAILED || mprotect(p, kGuard, PROT_NONE) != 0) abort();  // overflow faults instead of spoiling a
    free_stacks.push_back(p + kGuard);                                    // neighbour
  }
  fiber.stack = free_stacks.back();
  free_stacks.pop_back();
  void** sp = reinterpret_cast<void**>(fiber.stack + kStack);
  *--sp = nullptr;  // alignment, and where a return from first_function would go
  *--sp = reinterpret_cast<void*>(first_function);
  for (int i = 0; i < 6; ++i) *--sp = nullptr;
  fiber.stack_pointer = sp;
}

// A function that returns leaves no poison behind. The last ones never return, and none does in an abandoned launch.
void release_stack(Fiber& fiber, [[maybe_unused]] bool abandoned) {
#if ASAN
  constexpr size_t kLast = 16 << 10;
  const size_t bytes = abandoned ? kStack : kLast;
  __asan_unpoison_memory_region(fiber.stack + kStack - bytes, bytes);
#endif
  free_stacks.push_back(fiber.stack);
}

}  // namespace emu
