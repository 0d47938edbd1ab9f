// Rounding to bf16, to nearest even.
#pragma once
#include <stdint.h>

namespace distkv {
namespace DISTKV_ISA {

static inline uint16_t rounded(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>(bits >> 16 | 64);  // NaN stays NaN
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace DISTKV_ISA
}  // namespace distkv
