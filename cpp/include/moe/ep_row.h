// The bytes of one row between ranks:
//
//   [hidden: H of the wire type] [scale: fp32, if quantised] [ids: K int32, if any] [weights: K fp32 or fp64, if any]
//
// each part at a multiple of its element size, the whole padded to 16 bytes. Quantised, x = scale * q with
// scale = max |x| / (largest q): kFp8 is e4m3 (largest 448), kInt8 is symmetric (largest 127). Both round to nearest
// even. A row of zeros has scale 0; a row that is not finite has a scale that is not finite.
#pragma once

#include "moe/types.h"

namespace moe {

enum class Wire : int8_t { kInput, kFp8, kInt8 };

struct EpRow {
  int64_t hidden_size, top_k;
  DType dtype;
  Wire wire;
  bool has_ids, has_weights;

  constexpr int64_t hidden_bytes() const {
    return hidden_size * (wire == Wire::kInput ? static_cast<int64_t>(size_of(dtype)) : 1);
  }
  constexpr int64_t weight_bytes() const { return dtype == DType::kFloat64 ? 8 : 4; }
  constexpr int64_t scale_at() const { return round_up(hidden_bytes(), 4); }
  constexpr int64_t ids_at() const { return scale_at() + (wire == Wire::kInput ? 0 : 4); }
  constexpr int64_t weights_at() const { return round_up(ids_at() + (has_ids ? 4 * top_k : 0), weight_bytes()); }
  constexpr int64_t bytes() const { return round_up(weights_at() + (has_weights ? weight_bytes() * top_k : 0), 16); }

 private:
  static constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
};

}  // namespace moe
