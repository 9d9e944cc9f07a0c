// wgmma: D (64 x N, fp32 in registers) (+)= A (64 x 16) B (16 x N) by the four warps of a warpgroup, sm_90a (9.7.15).
#pragma once

#include "ptx/define.cuh"
#include "ptx/wgmma_operands.cuh"

#if MOE_PTX_SM90A
namespace moe::cuda::ptx {

// 9.7.15.7.1 wgmma.fence: before the first wgmma, and whenever registers that it uses were touched.
MOE_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// 9.7.15.7.2 wgmma.commit_group
MOE_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// 9.7.15.7.3 wgmma.wait_group: at most kPending groups are still running; D of the others may be read.
template <int kPending>
MOE_DEVICE void wgmma_wait() {
  static_assert(kPending >= 0 && kPending <= 7, "wgmma.wait_group waits for at most 7 groups");
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// 9.7.15.5.2 wgmma.mma_async.m64nNk16. D register i of warp w, lane 4 g + q: row 16 w + g + 8 ((i >> 1) & 1), column
// 8 (i >> 2) + 2 q + (i & 1). scale_d = 0: D = A B. kTransA, kTransB = 1: the operand is MN-major. Descriptors:
// 9.7.15.5.1.2. One function per N and type, because the assembler wants every register by name.
template <int N, typename T>
struct Wgmma;

#define MOE_WGMMA(N, TYPE, PTX_TYPE, R0, R1, R2, R3, R4, R5, R6)                                                    \
  template <>                                                                                                       \
  struct Wgmma<N, TYPE> {                                                                                           \
    template <int kTransA, int kTransB>                                                                             \
    static MOE_DEVICE void shared_a(float (&d)[N / 2], uint64_t a, uint64_t b, int scale_d) {                       \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #R2                                                         \
                   ", 0;\n"                                                                                         \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." PTX_TYPE "." PTX_TYPE " {" MOE_WGMMA_NAMES_##N \
                   "}, %" #R0 ", %" #R1 ", p, 1, 1, %" #R3 ", %" #R4 ";\n}\n"                                       \
                   : MOE_WGMMA_OPERANDS_##N                                                                         \
                   : "l"(a), "l"(b), "r"(scale_d), "n"(kTransA), "n"(kTransB)                                       \
                   : "memory");                                                                                     \
    }                                                                                                               \
    template <int kTransB>                                                                                          \
    static MOE_DEVICE void register_a(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, int scale_d) {         \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #R5                                                         \
                   ", 0;\n"                                                                                         \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." PTX_TYPE "." PTX_TYPE " {" MOE_WGMMA_NAMES_##N \
                   "}, {%" #R0 ",%" #R1 ",%" #R2 ",%" #R3 "}, %" #R4 ", p, 1, 1, %" #R6 ";\n}\n"                    \
                   : MOE_WGMMA_OPERANDS_##N                                                                         \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(scale_d), "n"(kTransB)                 \
                   : "memory");                                                                                     \
    }                                                                                                               \
  };
#define MOE_WGMMA_TYPES(...)                           \
  MOE_WGMMA_EXPAND(__nv_bfloat16, "bf16", __VA_ARGS__) \
  MOE_WGMMA_EXPAND(__half, "f16", __VA_ARGS__)
#define MOE_WGMMA_EXPAND(TYPE, PTX_TYPE, N, ...) MOE_WGMMA(N, TYPE, PTX_TYPE, __VA_ARGS__)

// N, then the numbers of the operands after the N / 2 registers of D.
MOE_WGMMA_TYPES(8, 4, 5, 6, 7, 8, 9, 10)
MOE_WGMMA_TYPES(16, 8, 9, 10, 11, 12, 13, 14)
MOE_WGMMA_TYPES(24, 12, 13, 14, 15, 16, 17, 18)
MOE_WGMMA_TYPES(32, 16, 17, 18, 19, 20, 21, 22)
MOE_WGMMA_TYPES(40, 20, 21, 22, 23, 24, 25, 26)
MOE_WGMMA_TYPES(48, 24, 25, 26, 27, 28, 29, 30)
MOE_WGMMA_TYPES(56, 28, 29, 30, 31, 32, 33, 34)
MOE_WGMMA_TYPES(64, 32, 33, 34, 35, 36, 37, 38)
MOE_WGMMA_TYPES(72, 36, 37, 38, 39, 40, 41, 42)
MOE_WGMMA_TYPES(80, 40, 41, 42, 43, 44, 45, 46)
MOE_WGMMA_TYPES(88, 44, 45, 46, 47, 48, 49, 50)
MOE_WGMMA_TYPES(96, 48, 49, 50, 51, 52, 53, 54)
MOE_WGMMA_TYPES(104, 52, 53, 54, 55, 56, 57, 58)
MOE_WGMMA_TYPES(112, 56, 57, 58, 59, 60, 61, 62)
MOE_WGMMA_TYPES(120, 60, 61, 62, 63, 64, 65, 66)
MOE_WGMMA_TYPES(128, 64, 65, 66, 67, 68, 69, 70)
MOE_WGMMA_TYPES(136, 68, 69, 70, 71, 72, 73, 74)
MOE_WGMMA_TYPES(144, 72, 73, 74, 75, 76, 77, 78)
MOE_WGMMA_TYPES(152, 76, 77, 78, 79, 80, 81, 82)
MOE_WGMMA_TYPES(160, 80, 81, 82, 83, 84, 85, 86)
MOE_WGMMA_TYPES(168, 84, 85, 86, 87, 88, 89, 90)
MOE_WGMMA_TYPES(176, 88, 89, 90, 91, 92, 93, 94)
MOE_WGMMA_TYPES(184, 92, 93, 94, 95, 96, 97, 98)
MOE_WGMMA_TYPES(192, 96, 97, 98, 99, 100, 101, 102)
MOE_WGMMA_TYPES(200, 100, 101, 102, 103, 104, 105, 106)
MOE_WGMMA_TYPES(208, 104, 105, 106, 107, 108, 109, 110)
MOE_WGMMA_TYPES(216, 108, 109, 110, 111, 112, 113, 114)
MOE_WGMMA_TYPES(224, 112, 113, 114, 115, 116, 117, 118)
MOE_WGMMA_TYPES(232, 116, 117, 118, 119, 120, 121, 122)
MOE_WGMMA_TYPES(240, 120, 121, 122, 123, 124, 125, 126)
MOE_WGMMA_TYPES(248, 124, 125, 126, 127, 128, 129, 130)
MOE_WGMMA_TYPES(256, 128, 129, 130, 131, 132, 133, 134)

#undef MOE_WGMMA
#undef MOE_WGMMA_TYPES
#undef MOE_WGMMA_EXPAND

// Both operands in shared memory.
template <int N, typename T, int kTransA = 0, int kTransB = 0>
MOE_DEVICE void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, int scale_d) {
  Wgmma<N, T>::template shared_a<kTransA, kTransB>(d, a, b, scale_d);
}
// A in registers, laid out as the A of mma_bf16_16816 with row 16 w + g; they must stay untouched until the wait.
template <int N, typename T, int kTransB = 0>
MOE_DEVICE void wgmma_register_a(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, int scale_d) {
  Wgmma<N, T>::template register_a<kTransB>(d, a, b, scale_d);
}

}  // namespace moe::cuda::ptx
#endif
