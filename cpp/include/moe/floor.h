// floor: what this machine can do at best. A benchmark divides the work of a call by these two numbers: the larger
// quotient is the time that no implementation can beat.
#pragma once

#include <memory>

#include "moe/types.h"

namespace moe {

// Floating-point operations per second of fused multiply-adds on registers, all threads together (an FMA is two), the
// best of the rounds that fit in `seconds`. fp32 for kFloat32, kBFloat16 and kFloat16; fp64 for kFloat64.
double fma_rate_cpu(DType dtype, double seconds, const ThreadPool& pool);

// The rate of the tile that GEMMs with many rows are made of, its operands in the first-level cache: the best of the
// rounds that fit in `seconds`. Who shares a core takes from it, and not from registers' FMAs, what loads need.
double tile_rate_cpu(double seconds, const ThreadPool& pool);

// Memory that is read in order, all threads together, eight streams per thread: one stream reads a fifth less on some
// processors.
class MemoryReader {
 public:
  // Takes and writes about `bytes`, in large pages where the system has them.
  MemoryReader(int64_t bytes, const ThreadPool& pool);
  // Bytes per second of reading one of kParts parts once, each call the next one, so that caches hold nothing of it; 0
  // when the memory could not be had.
  double read();
  // The best of the parts read in `seconds`.
  double best(double seconds);

  static constexpr int64_t kParts = 4;

 private:
  double read_part();

  const ThreadPool& pool_;
  int64_t threads_, stream_, next_ = 0;  // stream_: numbers of one stream
  std::unique_ptr<float[]> memory_;
};

}  // namespace moe
