// Sorting networks of keys in registers, within a lane and across the lanes that share a token: minima and maxima
// alone.
#pragma once

#include "ptx/ptx.cuh"

namespace moe::cuda {

// fold(x, y) over a token's lanes, the same in each of them.
template <int kLanes, typename Fold>
__device__ __forceinline__ float fold_lanes(float x, const Fold& fold) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) x = fold(x, __shfl_xor_sync(~0u, x, step));
  return x;
}
template <int kLanes>
__device__ __forceinline__ float sum_lanes(float x) {
  return fold_lanes<kLanes>(x, [](float a, float b) { return a + b; });
}
template <int kLanes>
__device__ __forceinline__ float max_lanes(float x) {
  return fold_lanes<kLanes>(x, [](float a, float b) { return fmaxf(a, b); });
}

// The larger first.
__device__ __forceinline__ void order(uint32_t& a, uint32_t& b) {
  const uint32_t larger = a > b ? a : b;
  b = a > b ? b : a;
  a = larger;
}

// Batcher's odd-even merge sort of n values, a power of two, as a list of pairs to be put in order.
template <int n>
struct Network {
  int count = 0, pairs[n * n / 2][2] = {};

  constexpr Network() {
    for (int size = 1; size < n; size *= 2) {
      for (int step = size; step > 0; step /= 2) {
        for (int i = step % size; i + step < n; i += 2 * step) {
          for (int j = i; j < i + step; ++j) {
            if (j / (2 * size) != (j + step) / (2 * size)) continue;
            pairs[count][0] = j;
            pairs[count++][1] = j + step;
          }
        }
      }
    }
  }
};

// The first n of a list, descending.
template <int n, int kCount>
__device__ __forceinline__ void sort(uint32_t (&list)[kCount]) {
  constexpr Network<n> kNetwork;
#pragma unroll
  for (int i = 0; i < kNetwork.count; ++i) order(list[kNetwork.pairs[i][0]], list[kNetwork.pairs[i][1]]);
}

// Descending, of a list that ascends and then descends, or the reverse.
template <int kCount>
__device__ __forceinline__ void sort_bitonic(uint32_t (&list)[kCount]) {
#pragma unroll
  for (int half = kCount / 2; half > 0; half /= 2) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if ((i & half) == 0) order(list[i], list[i + half]);
    }
  }
}

// The best of two descending lists; of either, only the first n are more than 0.
template <int n, int kCount>
__device__ __forceinline__ void merge(uint32_t (&list)[kCount], const uint32_t (&other)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const uint32_t last = other[kCount - 1 - i];
    if (i >= n)
      list[i] = last;
    else if (kCount - 1 - i < n)
      list[i] = list[i] > last ? list[i] : last;
  }
  sort_bitonic(list);
}

// The best of this lane's list and of that of the lane `step` away.
template <int n, int kCount>
__device__ __forceinline__ void merge_lanes(uint32_t (&list)[kCount], int step) {
  uint32_t other[kCount] = {};
#pragma unroll
  for (int i = 0; i < n; ++i) other[i] = __shfl_xor_sync(~0u, list[i], step);
  merge<n>(list, other);
}

// The best kCount of the n keys that each of kLanes lanes has: the same list in all of them.
template <int kLanes, int n, int kCount>
__device__ __forceinline__ void best_of_lanes(const uint32_t (&keys)[n], uint32_t (&list)[kCount]) {
  constexpr int kFirst = n < kCount ? n : kCount;
#pragma unroll
  for (int i = 0; i < kCount; ++i) list[i] = i < kFirst ? keys[i < kFirst ? i : 0] : 0;
  sort<kFirst>(list);
#pragma unroll
  for (int at = kCount; at < n; at += kCount) {
    uint32_t more[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) more[i] = keys[at + i];
    sort<kCount>(more);
    merge<kCount>(list, more);
  }
  if constexpr (kLanes > 1) merge_lanes<kFirst>(list, 1);
  if constexpr (kLanes > 2) merge_lanes<(2 * kFirst < kCount ? 2 * kFirst : kCount)>(list, 2);
#pragma unroll
  for (int step = 4; step < kLanes; step *= 2) merge_lanes<kCount>(list, step);
}

// The maximum of a power of two of values, by max(x, y).
template <int kUnit, typename Max>
__device__ __forceinline__ float unit_maximum(const float (&c)[kUnit], const Max& max) {
  float largest[kUnit / 2];
#pragma unroll
  for (int i = 0; i < kUnit / 2; ++i) largest[i] = max(c[i], c[i + kUnit / 2]);
#pragma unroll
  for (int half = kUnit / 4; half > 0; half /= 2) {
#pragma unroll
    for (int i = 0; i < half; ++i) largest[i] = max(largest[i], largest[i + half]);
  }
  return largest[0];
}

// The second largest; NaN is passed over.
template <int kUnit>
__device__ __forceinline__ float second_of_unit(const float (&c)[kUnit]) {
  float first[kUnit / 2], second[kUnit / 2];
#pragma unroll
  for (int i = 0; i < kUnit / 2; ++i) {
    first[i] = fmaxf(c[i], c[i + kUnit / 2]), second[i] = fminf(c[i], c[i + kUnit / 2]);
  }
#pragma unroll
  for (int half = kUnit / 4; half > 0; half /= 2) {
#pragma unroll
    for (int i = 0; i < half; ++i) {
      second[i] = fmaxf(fminf(first[i], first[i + half]), fmaxf(second[i], second[i + half]));
      first[i] = fmaxf(first[i], first[i + half]);
    }
  }
  return second[0];
}

}  // namespace moe::cuda
