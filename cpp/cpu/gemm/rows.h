// Work on one contiguous row.
#pragma once

#include "gemm/kernels.h"
#include "gemm/simd.h"

namespace moe::MOE_ISA {

template <typename Storage>
void widen_row(const Storage* src, int64_t n, Wide<Storage>* dst) {
  for_vectors<Wide<Storage>>(n, [&](auto load, auto store) { store(dst, load(src)); });
}

template <typename Storage>
void narrow_row(const Wide<Storage>* src, int64_t n, Storage* dst) {
  for_vectors<Wide<Storage>>(n, [&](auto load, auto store) { store(dst, load(src)); });
}

template <typename Storage>
void stream_row(const Wide<Storage>* src, int64_t n, Storage* dst) {
  using Real = Wide<Storage>;
  constexpr int64_t kBlock = MOE_VECTOR_BYTES / sizeof(Storage);  // one vector of the narrow type
  for (int64_t i = 0; i < n; i += kBlock) {
    alignas(MOE_VECTOR_BYTES) Storage block[kBlock];
    for (int64_t j = 0; j < kBlock; j += kLanes<Real>) store(block + j, load(src + i + j));
    stream(reinterpret_cast<Real*>(dst + i), load(reinterpret_cast<const Real*>(block)));
  }
}

template <typename Real>
void axpy(Real s, const Real* x, int64_t n, Real* y) {
  for_vectors<Real>(n, [&](auto load, auto store) { store(y, load(y) + broadcast(s) * load(x)); });
}

template <typename Real>
inline Real sum_of_lanes(Vec<Real> x) {
  Vec<Real> group[kLanes<Real>] = {x};
  sum_lanes<Real>(group);
  return group[0][0];
}

template <typename Real>
Real dot_row(const Real* x, const Real* y, int64_t n) {
  Vec<Real> sum{};
  for_vectors<Real>(n, [&](auto load, auto) { sum += load(x) * load(y); });
  return sum_of_lanes<Real>(sum);
}

template <typename Real>
void scale(Real s, int64_t n, Real* x) {
  for_vectors<Real>(n, [&](auto load, auto store) { store(x, broadcast(s) * load(x)); });
}

template <typename Real>
Real read_streams(const Real* data, int64_t n) {
  constexpr int64_t kAhead = 1024 / sizeof(Real);
  Vec<Real> sums[kMaxTileRows] = {};
  for (int64_t i = 0; i + kLanes<Real> <= n; i += kLanes<Real>) {
#pragma GCC unroll 8
    for (int64_t s = 0; s < kMaxTileRows; ++s) {
      fetch_early(data + s * n + i + kAhead);
      sums[s] += load(data + s * n + i);
    }
  }
  Vec<Real> total{};
#pragma GCC unroll 8
  for (int64_t s = 0; s < kMaxTileRows; ++s) total += sums[s];
  return sum_of_lanes<Real>(total);
}

template <typename Real>
int64_t fma_rounds(int64_t repeats, Real* sink) {
  Vec<Real> sums[MOE_ACCUMULATORS];
  const Vec<Real> a = broadcast(*sink), b = broadcast(Real(1) - *sink);
#pragma GCC unroll 32
  for (int j = 0; j < MOE_ACCUMULATORS; ++j) sums[j] = broadcast(Real(j));
  for (int64_t i = 0; i < repeats; ++i) {
#pragma GCC unroll 32
    for (int j = 0; j < MOE_ACCUMULATORS; ++j) sums[j] = sums[j] * b + a;  // tends to 1: no overflow, no subnormals
  }
  Vec<Real> total{};
#pragma GCC unroll 32
  for (int j = 0; j < MOE_ACCUMULATORS; ++j) total += sums[j];
  *sink = sum_of_lanes<Real>(total);
  return repeats * MOE_ACCUMULATORS * kLanes<Real>;
}

}  // namespace moe::MOE_ISA
