// Vector operations on 4 floats with Arm's NEON (AArch64).
#pragma once
#include <arm_neon.h>

#include "core.h"

namespace distkv {
namespace DISTKV_ISA {

struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };

using F = float32x4_t;
constexpr int W = 4;
constexpr int kRows = 4;
constexpr int kColumns = 4;  // of 32 registers, tiles of 6 x 4 sums take 24

static inline F zero() { return vdupq_n_f32(0); }
static inline F set1(float x) { return vdupq_n_f32(x); }
static inline F load(const float* p) { return vld1q_f32(p); }
static inline void store(float* p, F x) { vst1q_f32(p, x); }
static inline F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
static inline F mul(F a, F b) { return vmulq_f32(a, b); }
static inline F add(F a, F b) { return vaddq_f32(a, b); }
static inline F sub(F a, F b) { return vsubq_f32(a, b); }
static inline F div(F a, F b) { return vdivq_f32(a, b); }
static inline F max(F a, F b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }  // b where one of them is NaN, as on x86
static inline F where_less(F a, F b, F x, F y) { return vbslq_f32(vcltq_f32(a, b), x, y); }
static inline float reduce_max(F x) { return vmaxvq_f32(x); }
static inline float reduce_add(F x) { return vaddvq_f32(x); }

static inline F widen(uint16x4_t x, bf16) { return vreinterpretq_f32_u32(vshll_n_u16(x, 16)); }
static inline F widen(uint16x4_t x, fp16) { return vcvt_f32_f16(vreinterpret_f16_u16(x)); }

template <class T>
static inline F load_kv(const T* p) { return widen(vld1_u16((const uint16_t*)p), T{}); }
static inline F load_kv(const float* p) { return load(p); }
static inline F load_kv(const int8_t* p) {
  int32_t four;
  __builtin_memcpy(&four, p, 4);
  const int16x8_t wide = vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four)));
  return vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide)));
}
// Head dims are multiples of 8: a vector is never partial here.
template <class T>
static inline F load_part(const T* p, int) { return load_kv(p); }

template <bool Exact>
static inline F exp2(F x) {
  x = max(set1(-127.0f), x);  // this order keeps NaN
  const F n = vrndnq_f32(x), f = sub(x, n);
  F p = set1(1.535336188319500e-4f);
  p = fma(p, f, set1(1.339887440266574e-3f));
  p = fma(p, f, set1(9.618437357674640e-3f));
  p = fma(p, f, set1(5.550332471162809e-2f));
  p = fma(p, f, set1(2.402264791363012e-1f));
  p = fma(p, f, set1(6.931472028550421e-1f));
  p = fma(p, f, set1(1.0f));
  return mul(p, vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127)), 23)));
}

static inline void sum4(F a, F b, F c, F d, float* to) { store(to, vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d))); }

static inline void transpose(F* v) {
  const float64x2_t a = vreinterpretq_f64_f32(vtrn1q_f32(v[0], v[1])), b = vreinterpretq_f64_f32(vtrn2q_f32(v[0], v[1]));
  const float64x2_t c = vreinterpretq_f64_f32(vtrn1q_f32(v[2], v[3])), d = vreinterpretq_f64_f32(vtrn2q_f32(v[2], v[3]));
  v[0] = vreinterpretq_f32_f64(vtrn1q_f64(a, c));
  v[1] = vreinterpretq_f32_f64(vtrn1q_f64(b, d));
  v[2] = vreinterpretq_f32_f64(vtrn2q_f64(a, c));
  v[3] = vreinterpretq_f32_f64(vtrn2q_f64(b, d));
}

}  // namespace DISTKV_ISA
}  // namespace distkv
