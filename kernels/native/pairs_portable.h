// Pairs of bf16 in the compiler's own vectors of 128 bits. They have no dot product of pairs; the matrix unit has one.
#pragma once
#include "simd_portable.h"

namespace distkv {
namespace DISTKV_ISA {

typedef uint16_t Pairs __attribute__((vector_size(16)));  // W pairs
typedef uint32_t U __attribute__((vector_size(16)));

static inline Pairs load_pairs(const bf16* p) {
  Pairs x;
  memcpy(&x, p, sizeof x);
  return x;
}
// Head dims are multiples of 8: all numbers exist, or none.
static inline Pairs load_pairs(const bf16* p, int n) { return n > 0 ? load_pairs(p) : Pairs{}; }
static inline void store_pairs(bf16* p, Pairs x, int n) {
  if (n > 0) memcpy(p, &x, sizeof x);
}
static inline F as_floats(Pairs x) { return (F)x; }  // the bits

// Rows x and y of values as (x0, y0), (x1, y1), ...: the pairs of columns [0, W) and of columns [W, 2 W).
static inline void interleave(Pairs x, Pairs y, bf16* low, bf16* high) {
  const Pairs first = {x[0], y[0], x[1], y[1], x[2], y[2], x[3], y[3]};
  const Pairs second = {x[4], y[4], x[5], y[5], x[6], y[6], x[7], y[7]};
  memcpy(low, &first, sizeof first);
  if (high) memcpy(high, &second, sizeof second);
}

// To the nearest, ties to even; NaN stays NaN.
static inline void narrow(bf16* p, F x) {
  const U bits = (U)x, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const U y = x == x ? rounded : (bits >> 16) | 0x40;
  for (int i = 0; i < W; ++i) p[i].bits = (uint16_t)y[i];
}

}  // namespace DISTKV_ISA
}  // namespace distkv
