// Operations of a decoder layer between its matrix products, on rows of bf16: computed in fp32, and rounded wherever
// the modules of transformers round. DISTKV_ISA, its vectors and their rounding are defined before: narrow(x, to)
// stores as bf16, and rounded_once(x) is what wide() would read afterwards.
#pragma once
#include <math.h>

#include "decoder_layer.h"

namespace distkv {
namespace DISTKV_ISA {

static inline F wide(const uint16_t* at) { return load_kv(reinterpret_cast<const bf16*>(at)); }

static void norm(const uint16_t* x, const uint16_t* weight, uint16_t* out, int64_t size, float epsilon) {
  F squares = zero();
  for (int64_t i = 0; i < size; i += W) squares = fma(wide(x + i), wide(x + i), squares);
  const F scale = set1(1.0f / sqrtf(reduce_add(squares) / static_cast<float>(size) + epsilon));
  for (int64_t i = 0; i < size; i += W) narrow(mul(wide(weight + i), rounded_once(mul(wide(x + i), scale))), out + i);
}

static void sum(const uint16_t* a, const uint16_t* b, uint16_t* out, int64_t size) {
  for (int64_t i = 0; i < size; i += W) narrow(add(wide(a + i), wide(b + i)), out + i);
}

// Rotates the halves of a head by the angles of its position.
static void rotate(const uint16_t* x, const uint16_t* cosines, const uint16_t* sines, uint16_t* out, int64_t size) {
  const int64_t half = size / 2;
  for (int64_t i = 0; i < half; i += W) {
    const F first = wide(x + i), second = wide(x + half + i);
    const F low = rounded_once(mul(first, wide(cosines + i)));
    const F high = rounded_once(mul(second, wide(cosines + half + i)));
    narrow(sub(low, rounded_once(mul(second, wide(sines + i)))), out + i);
    narrow(add(high, rounded_once(mul(first, wide(sines + half + i)))), out + half + i);
  }
}

// silu(gate) * up, computed from e^-|gate|, which does not overflow.
static void gated(const uint16_t* gate, const uint16_t* up, uint16_t* out, int64_t size) {
  const F one = set1(1.0f);
  for (int64_t i = 0; i < size; i += W) {
    const F x = wide(gate + i), falling = exp2<true>(mul(where_less(x, zero(), x, sub(zero(), x)), set1(kLog2E)));
    const F share = div(where_less(x, zero(), falling, one), add(one, falling));
    narrow(mul(rounded_once(mul(x, share)), wide(up + i)), out + i);
  }
}

}  // namespace DISTKV_ISA
}  // namespace distkv

#define DISTKV_ELEMENTWISE(name) \
  { name, DISTKV_ISA::norm, DISTKV_ISA::sum, DISTKV_ISA::rotate, DISTKV_ISA::gated }
