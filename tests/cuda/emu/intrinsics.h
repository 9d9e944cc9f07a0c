// Built-in variables and functions of CUDA C++, for the CPU.
#pragma once

#include "emu/emu.h"

// Plain globals, rewritten when another thread runs: there is one operating-system thread.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace emu {

template <typename T>
struct Shuffle {
  T in, out;
  int mode, lane, width;  // 0: from a lane, 1: up, 2: down, 3: xor
};
template <typename T>
T shuffle(uint32_t mask, T value, int mode, int lane, int width, const Where& where) {
  Shuffle<T> mine{value, value, mode, lane, width};
  collective(
      "shfl.sync", mask, &mine,
      [](uint32_t lanes, void* const* argument, const Where& at) {
        for (int l = 0; l < 32; ++l) {
          if (!(lanes >> l & 1)) continue;
          auto& a = *static_cast<Shuffle<T>*>(argument[l]);
          const int base = l & ~(a.width - 1), i = l & (a.width - 1);
          int s = l;
          if (a.mode == 0) s = base + (a.lane & (a.width - 1));
          if (a.mode == 1 && i >= a.lane) s = l - a.lane;
          if (a.mode == 2 && i + a.lane < a.width) s = l + a.lane;
          if (a.mode == 3) s = (i ^ a.lane) >= a.width ? l : base + (i ^ a.lane);
          if (!(lanes >> s & 1)) fail(at, "shfl.sync reads lane %d, which takes no part (lanes %08x)", s, lanes);
          a.out = static_cast<Shuffle<T>*>(argument[s])->in;
        }
      },
      Lanes::kSameLine, where);
  return mine.out;
}

template <typename T>
struct Vote {
  T in;
  uint32_t out;
};
inline uint32_t ballot(uint32_t mask, bool predicate, const Where& where) {
  Vote<bool> mine{predicate, 0};
  collective(
      "vote.sync", mask, &mine,
      [](uint32_t lanes, void* const* argument, const Where&) {
        uint32_t votes = 0;
        for (int l = 0; l < 32; ++l)
          if ((lanes >> l & 1) && static_cast<Vote<bool>*>(argument[l])->in) votes |= 1u << l;
        for (int l = 0; l < 32; ++l)
          if (lanes >> l & 1) static_cast<Vote<bool>*>(argument[l])->out = votes;
      },
      Lanes::kSameLine, where);
  return mine.out;
}
template <typename T>
uint32_t match_any(uint32_t mask, T value, const Where& where) {
  Vote<T> mine{value, 0};
  collective(
      "match.any.sync", mask, &mine,
      [](uint32_t lanes, void* const* argument, const Where&) {
        for (int l = 0; l < 32; ++l) {
          if (!(lanes >> l & 1)) continue;
          auto& a = *static_cast<Vote<T>*>(argument[l]);
          for (int k = 0; k < 32; ++k)
            if ((lanes >> k & 1) && static_cast<Vote<T>*>(argument[k])->in == a.in) a.out |= 1u << k;
        }
      },
      Lanes::kSameLine, where);
  return mine.out;
}
template <typename Op, typename T>
T reduce(uint32_t mask, T value, const Where& where) {
  T mine = value;
  collective(
      "redux.sync", mask, &mine,
      [](uint32_t lanes, void* const* argument, const Where&) {
        const int first = __builtin_ctz(lanes);
        T sum = *static_cast<T*>(argument[first]);
        for (int l = first + 1; l < 32; ++l)
          if (lanes >> l & 1) sum = static_cast<T>(Op()(sum, *static_cast<T*>(argument[l])));
        for (int l = 0; l < 32; ++l)
          if (lanes >> l & 1) *static_cast<T*>(argument[l]) = sum;
      },
      Lanes::kSameLine, where);
  return mine;
}
struct Larger {
  template <typename T>
  T operator()(T a, T b) const {
    return a > b ? a : b;
  }
};
struct Smaller {
  template <typename T>
  T operator()(T a, T b) const {
    return a < b ? a : b;
  }
};

// One operating-system thread, so an atomic is plain code; the hooks of the race build must not see it as such.
template <typename T, typename F>
__attribute__((noinline, no_sanitize("thread"))) T atomic(T* p, F update) {
  yield_point();
  note_atomic(p, sizeof(T));
  const T old = *p;
  *p = update(old);
  return old;
}

}  // namespace emu

// ---- synchronisation and warp collectives
#define EMU_WHERE const emu::Where& where = emu::Where::current()
inline void __syncthreads(EMU_WHERE) { emu::bar_sync(0, -1, where); }
inline int __syncthreads_count(int p, EMU_WHERE) { return emu::bar_reduce(0, p, where); }
inline int __syncthreads_or(int p, EMU_WHERE) { return emu::bar_reduce(1, p, where); }
inline int __syncthreads_and(int p, EMU_WHERE) { return emu::bar_reduce(2, p, where); }
inline void __syncwarp(uint32_t mask = ~0u, EMU_WHERE) { emu::syncwarp(mask, where); }
inline void __threadfence() { emu::note_fence(), emu::yield_point(); }
inline void __threadfence_block() { emu::yield_point(); }
inline void __nanosleep(unsigned) { emu::spin(); }
template <typename T>
T __shfl_sync(uint32_t mask, T v, int lane, int width = 32, EMU_WHERE) {
  return emu::shuffle(mask, v, 0, lane, width, where);
}
template <typename T>
T __shfl_up_sync(uint32_t mask, T v, int by, int width = 32, EMU_WHERE) {
  return emu::shuffle(mask, v, 1, by, width, where);
}
template <typename T>
T __shfl_down_sync(uint32_t mask, T v, int by, int width = 32, EMU_WHERE) {
  return emu::shuffle(mask, v, 2, by, width, where);
}
template <typename T>
T __shfl_xor_sync(uint32_t mask, T v, int by, int width = 32, EMU_WHERE) {
  return emu::shuffle(mask, v, 3, by, width, where);
}
inline uint32_t __ballot_sync(uint32_t mask, int p, EMU_WHERE) { return emu::ballot(mask, p, where); }
inline int __any_sync(uint32_t mask, int p, EMU_WHERE) { return emu::ballot(mask, p, where) != 0; }
inline int __all_sync(uint32_t mask, int p, EMU_WHERE) { return emu::ballot(mask, !p, where) == 0; }
template <typename T>
uint32_t __match_any_sync(uint32_t mask, T v, EMU_WHERE) {
  return emu::match_any(mask, v, where);
}
#define EMU_REDUCE(name, Op)                                \
  template <typename T>                                     \
  T __reduce_##name##_sync(uint32_t mask, T v, EMU_WHERE) { \
    return emu::reduce<Op>(mask, v, where);                 \
  }
EMU_REDUCE(add, std::plus<>)
EMU_REDUCE(and, std::bit_and<>)
EMU_REDUCE(or, std::bit_or<>)
EMU_REDUCE(xor, std::bit_xor<>)
EMU_REDUCE(max, emu::Larger)
EMU_REDUCE(min, emu::Smaller)
#undef EMU_REDUCE
#undef EMU_WHERE

// ---- atomics
#define EMU_ATOMIC(name, expression)                                          \
  template <typename T>                                                       \
  T name(T* p, std::type_identity_t<T> v) {                                   \
    return emu::atomic(p, [&](T old) { return static_cast<T>(expression); }); \
  }
EMU_ATOMIC(atomicAdd, old + v)
EMU_ATOMIC(atomicSub, old - v)
EMU_ATOMIC(atomicMax, old > v ? old : v)
EMU_ATOMIC(atomicMin, old < v ? old : v)
EMU_ATOMIC(atomicAnd, old& v)
EMU_ATOMIC(atomicOr, old | v)
EMU_ATOMIC(atomicXor, old ^ v)
EMU_ATOMIC(atomicExch, (static_cast<void>(old), v))
#undef EMU_ATOMIC
template <typename T>
T atomicCAS(T* p, std::type_identity_t<T> expected, std::type_identity_t<T> v) {
  return emu::atomic(p, [&](T old) { return old == expected ? v : old; });
}

// ---- loads and stores with a cache hint
#define EMU_LOAD(name)  \
  template <typename T> \
  T name(const T* p) {  \
    return *p;          \
  }
EMU_LOAD(__ldg)
EMU_LOAD(__ldcs)
EMU_LOAD(__ldcg)
EMU_LOAD(__ldca)
EMU_LOAD(__ldlu)
EMU_LOAD(__ldcv)
#undef EMU_LOAD
#define EMU_STORE(name)                        \
  template <typename T>                        \
  void name(T* p, std::type_identity_t<T> v) { \
    *p = v;                                    \
  }
EMU_STORE(__stcs)
EMU_STORE(__stcg)
EMU_STORE(__stwb)
EMU_STORE(__stwt)
#undef EMU_STORE

// ---- integers and bits
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __popcll(uint64_t x) { return __builtin_popcountll(x); }
inline int __clz(uint32_t x) { return x ? __builtin_clz(x) : 32; }
inline int __clzll(uint64_t x) { return x ? __builtin_clzll(x) : 64; }
inline int __ffs(uint32_t x) { return __builtin_ffs(static_cast<int>(x)); }
inline int __ffsll(uint64_t x) { return __builtin_ffsll(static_cast<long long>(x)); }
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return static_cast<uint32_t>(uint64_t{a} * b >> 32); }
inline uint32_t __brev(uint32_t x) {
  uint32_t r = 0;
  for (int i = 0; i < 32; ++i) r |= (x >> i & 1) << (31 - i);
  return r;
}
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = uint64_t{b} << 32 | a;
  uint32_t r = 0;
  for (int i = 0; i < 4; ++i) r |= static_cast<uint32_t>(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return r;
}
template <typename A, typename B>
  requires(std::is_arithmetic_v<A> && std::is_arithmetic_v<B>)
auto min(A a, B b) {
  using T = std::common_type_t<A, B>;
  return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(a) : static_cast<T>(b);
}
template <typename A, typename B>
  requires(std::is_arithmetic_v<A> && std::is_arithmetic_v<B>)
auto max(A a, B b) {
  using T = std::common_type_t<A, B>;
  return static_cast<T>(a) > static_cast<T>(b) ? static_cast<T>(a) : static_cast<T>(b);
}

// ---- floating point
inline uint32_t __float_as_uint(float x) { return __builtin_bit_cast(uint32_t, x); }
inline int32_t __float_as_int(float x) { return __builtin_bit_cast(int32_t, x); }
inline float __uint_as_float(uint32_t x) { return __builtin_bit_cast(float, x); }
inline float __int_as_float(int32_t x) { return __builtin_bit_cast(float, x); }
inline long long __double_as_longlong(double x) { return __builtin_bit_cast(long long, x); }
inline double __longlong_as_double(long long x) { return __builtin_bit_cast(double, x); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1 / x; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline float __saturatef(float x) { return x > 1 ? 1 : x > 0 ? x : 0; }
