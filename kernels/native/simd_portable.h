// Vector operations on 4 floats in the compiler's own vector extension: any processor.
#pragma once
#include <string.h>

#include "core.h"

namespace distkv {
namespace DISTKV_ISA {

struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };

typedef float F __attribute__((vector_size(16)));
typedef int32_t I __attribute__((vector_size(16)));
constexpr int W = 4;
constexpr int kRows = 2;
constexpr int kColumns = 2;

static inline F set1(float x) { return F{x, x, x, x}; }
static inline F zero() { return set1(0); }
static inline F load(const float* p) { F x; memcpy(&x, p, sizeof x); return x; }
static inline void store(float* p, F x) { memcpy(p, &x, sizeof x); }
static inline F fma(F a, F b, F c) { return a * b + c; }
static inline F mul(F a, F b) { return a * b; }
static inline F add(F a, F b) { return a + b; }
static inline F sub(F a, F b) { return a - b; }
static inline F div(F a, F b) { return a / b; }
static inline F max(F a, F b) { return a > b ? a : b; }
static inline F where_less(F a, F b, F x, F y) { return a < b ? x : y; }
static inline float reduce_max(F x) {
  const float a = x[0] > x[1] ? x[0] : x[1], b = x[2] > x[3] ? x[2] : x[3];
  return a > b ? a : b;
}
static inline float reduce_add(F x) { return (x[0] + x[1]) + (x[2] + x[3]); }

static inline F widen(I x, bf16) { return (F)(x << 16); }
static inline F widen(I x, fp16) {
  const I magnitude = x & 0x7fff;
  const F finite = (F)(magnitude << 13) * 0x1p112f;
  const I special = (magnitude << 13) | 0x7f800000;
  return (F)((magnitude >= 0x7c00 ? special : (I)finite) | ((x & 0x8000) << 16));
}

template <class T>
static inline F load_kv(const T* p) { return widen(I{p[0].bits, p[1].bits, p[2].bits, p[3].bits}, T{}); }
static inline F load_kv(const float* p) { return load(p); }
static inline F load_kv(const int8_t* p) { return F{(float)p[0], (float)p[1], (float)p[2], (float)p[3]}; }
// Head dims are multiples of 8: a vector is never partial here.
template <class T>
static inline F load_part(const T* p, int) { return load_kv(p); }

template <bool Exact>
static inline F exp2(F x) {
  x = max(set1(-127.0f), x);  // this order keeps NaN
  const F shifted = x + 0x1.8p23f;  // adding 1.5 * 2^23 rounds to the nearest integer
  const F f = x - (shifted - 0x1.8p23f);
  F p = set1(1.535336188319500e-4f);
  p = fma(p, f, set1(1.339887440266574e-3f));
  p = fma(p, f, set1(9.618437357674640e-3f));
  p = fma(p, f, set1(5.550332471162809e-2f));
  p = fma(p, f, set1(2.402264791363012e-1f));
  p = fma(p, f, set1(6.931472028550421e-1f));
  p = fma(p, f, set1(1.0f));
  return p * (F)((((I)shifted - 0x4b400000) + 127) << 23);
}

static inline void sum4(F a, F b, F c, F d, float* to) {
  to[0] = reduce_add(a);
  to[1] = reduce_add(b);
  to[2] = reduce_add(c);
  to[3] = reduce_add(d);
}

static inline void transpose(F* v) {
  const F a = v[0], b = v[1], c = v[2], d = v[3];
  for (int i = 0; i < 4; ++i) v[i] = F{a[i], b[i], c[i], d[i]};
}

}  // namespace DISTKV_ISA
}  // namespace distkv
