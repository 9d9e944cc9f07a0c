// 16-bit and tf32 bits to fp32, as the matrix units read them.
#pragma once

#include "emu/ptx_emu.h"

namespace emu {

inline float from_bf16(uint16_t x) { return __uint_as_float(uint32_t{x} << 16); }
inline float from_f16(uint16_t x) {
  _Float16 h;
  memcpy(&h, &x, 2);
  return static_cast<float>(h);
}
inline float from_tf32(uint32_t x) { return __uint_as_float(x & 0xffffe000u); }  // hardware ignores the 13 low bits
inline float from_16(uint16_t x, Element type) { return type == Element::kBFloat16 ? from_bf16(x) : from_f16(x); }

}  // namespace emu
