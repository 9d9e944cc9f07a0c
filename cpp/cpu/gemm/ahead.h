// Rows that are fetched while others are multiplied, spread evenly over the steps of the tiles.
#pragma once

#include "gemm/kernels.h"
#include "parallel.h"

namespace moe {

// Cuts `rows` rows of `bytes` each, `stride` bytes apart, into what each of the calls of `outer` that make `steps`
// steps together fetches. Nothing by default, or from null on.
// `twice`: each line is fetched twice, first while the `rows` before them are, since a core that asks for more than it
// can keep under way drops what is too much.
class RowsAhead {
 public:
  RowsAhead() = default;
  RowsAhead(const void* first, int64_t rows, int64_t stride, int64_t bytes, int64_t steps, bool twice = false)
      : row_(static_cast<const char*>(first)),
        rows_left_(first == nullptr ? 0 : rows),
        stride_(stride),
        again_(twice ? rows * stride : 0) {
    const int64_t lines = ceil_div(bytes, kCacheLine);
    while (lines_ < kMostLines && ceil_div(lines, lines_) * rows > steps) ++lines_;
    steps_ = ceil_div(lines, lines_);
  }

  // For a call of `steps` steps.
  Fetch next(int64_t steps) {
    if (rows_left_ <= 0) return {};
    const int64_t width = lines_ * kCacheLine;
    const Fetch fetch{row_ + step_ * width, lines_, steps_ - step_, steps_, stride_ - steps_ * width, again_};
    const int64_t done = (step_ + steps) / steps_;
    step_ = (step_ + steps) % steps_;
    row_ += done * stride_;
    rows_left_ -= done;
    return fetch;
  }

 private:
  static constexpr int64_t kMostLines = 4;

  const char* row_ = nullptr;
  int64_t rows_left_ = 0, stride_ = 0, again_ = 0, lines_ = 1, steps_ = 1, step_ = 0;  // steps_: of a row
};

}  // namespace moe
