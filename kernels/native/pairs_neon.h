// Pairs of bf16 with Arm's bf16 instructions.
#pragma once
#include "simd_neon.h"

namespace distkv {
namespace DISTKV_ISA {

using Pairs = uint16x8_t;  // W pairs

static inline Pairs load_pairs(const bf16* p) { return vld1q_u16((const uint16_t*)p); }
// Head dims are multiples of 8: all numbers exist, or none.
static inline Pairs load_pairs(const bf16* p, int n) { return n > 0 ? load_pairs(p) : vdupq_n_u16(0); }
static inline void store_pairs(bf16* p, Pairs x, int n) {
  if (n > 0) vst1q_u16((uint16_t*)p, x);
}
static inline F as_floats(Pairs x) { return vreinterpretq_f32_u16(x); }  // the bits

// Rows x and y of values as (x0, y0), (x1, y1), ...: the pairs of columns [0, W) and of columns [W, 2 W).
static inline void interleave(Pairs x, Pairs y, bf16* low, bf16* high) {
  vst1q_u16((uint16_t*)low, vzip1q_u16(x, y));
  if (high) vst1q_u16((uint16_t*)high, vzip2q_u16(x, y));
}

static inline void narrow(bf16* p, F x) { vst1_u16((uint16_t*)p, vreinterpret_u16_bf16(vcvt_bf16_f32(x))); }

static inline Pairs broadcast_pair(const bf16* p) {
  uint32_t pair;
  __builtin_memcpy(&pair, p, 4);
  return vreinterpretq_u16_u32(vdupq_n_u32(pair));
}
static inline F dot(F sum, Pairs a, Pairs b) {
  return vbfdotq_f32(sum, vreinterpretq_bf16_u16(a), vreinterpretq_bf16_u16(b));
}

}  // namespace DISTKV_ISA
}  // namespace distkv
