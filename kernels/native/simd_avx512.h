// Vector operations on 16 floats with AVX-512 (F, BW, DQ, VL).
#pragma once
#include <immintrin.h>

#include "core.h"

namespace distkv {
namespace DISTKV_ISA {

struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };

using F = __m512;
constexpr int W = 16;         // floats per vector
constexpr int kRows = 4;      // query rows that the streaming kernel holds in registers
constexpr int kColumns = 4;   // vectors of a matrix product's row that stay in registers

static inline F zero() { return _mm512_setzero_ps(); }
static inline F set1(float x) { return _mm512_set1_ps(x); }
static inline F load(const float* p) { return _mm512_loadu_ps(p); }
static inline void store(float* p, F x) { _mm512_storeu_ps(p, x); }
static inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
static inline F mul(F a, F b) { return _mm512_mul_ps(a, b); }
static inline F add(F a, F b) { return _mm512_add_ps(a, b); }
static inline F sub(F a, F b) { return _mm512_sub_ps(a, b); }
static inline F div(F a, F b) { return _mm512_div_ps(a, b); }
static inline F max(F a, F b) { return _mm512_max_ps(a, b); }
static inline F where_less(F a, F b, F x, F y) { return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), y, x); }
static inline float reduce_max(F x) { return _mm512_reduce_max_ps(x); }
static inline float reduce_add(F x) { return _mm512_reduce_add_ps(x); }

static inline __mmask16 lanes(int n) { return (__mmask16)((1u << n) - 1); }
static inline F widen(__m256i x, bf16) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
static inline F widen(__m256i x, fp16) { return _mm512_cvtph_ps(x); }
static inline F widen(__m128i x) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(x)); }

// KV elements as floats; load_part reads only n of them and fills with zero.
template <class T>
static inline F load_kv(const T* p) { return widen(_mm256_loadu_si256((const __m256i*)p), T{}); }
static inline F load_kv(const float* p) { return load(p); }
static inline F load_kv(const int8_t* p) { return widen(_mm_loadu_si128((const __m128i*)p)); }
template <class T>
static inline F load_part(const T* p, int n) { return widen(_mm256_maskz_loadu_epi16(lanes(n), p), T{}); }
static inline F load_part(const float* p, int n) { return _mm512_maskz_loadu_ps(lanes(n), p); }
static inline F load_part(const int8_t* p, int n) { return widen(_mm_maskz_loadu_epi8(lanes(n), p)); }

// 2^x, relative error below 1e-7 (Exact) or 3e-6. The fraction is rounded down because scalef rounds its exponent
// down, so that the exponent and -inf need no extra instructions.
template <bool Exact>
static inline F exp2(F x) {
  const F f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  F p = set1(Exact ? 2.161291635627122e-4f : 1.342668553101050e-2f);
  if (Exact) {
    p = fma(p, f, set1(1.246784607807476e-3f));
    p = fma(p, f, set1(9.675451602368245e-3f));
  }
  p = fma(p, f, set1(Exact ? 5.548528060341174e-2f : 5.224247220066491e-2f));
  p = fma(p, f, set1(Exact ? 2.402293055550260e-1f : 2.412802056977784e-1f));
  p = fma(p, f, set1(Exact ? 6.931470444431633e-1f : 6.930448447834590e-1f));
  p = fma(p, f, set1(1.0f));
  return _mm512_scalef_ps(p, x);
}

// Four horizontal sums to four floats.
static inline void sum4(F a, F b, F c, F d, float* to) {
  const F ab = add(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const F cd = add(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512d lo = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  const __m512d hi = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  const F s = add(_mm512_castpd_ps(lo), _mm512_castpd_ps(hi));
  const __m256 h = _mm256_add_ps(_mm512_castps512_ps256(s), _mm512_extractf32x8_ps(s, 1));
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1)));
}

// Transpose a W x W matrix of 4-byte elements held in vectors.
static inline void transpose(F* v) {
  F t[16], u[16];
  DISTKV_UNROLL
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(v[i], v[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(v[i], v[i + 1]);
  }
  DISTKV_UNROLL
  for (int i = 0; i < 16; i += 4) {
    const __m512d a = _mm512_castps_pd(t[i]), b = _mm512_castps_pd(t[i + 1]);
    const __m512d c = _mm512_castps_pd(t[i + 2]), d = _mm512_castps_pd(t[i + 3]);
    u[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
    u[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
    u[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
    u[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
  }
  DISTKV_UNROLL
  for (int i = 0; i < 4; ++i) {
    const F a = _mm512_shuffle_f32x4(u[i], u[4 + i], 0x88), b = _mm512_shuffle_f32x4(u[i], u[4 + i], 0xdd);
    const F c = _mm512_shuffle_f32x4(u[8 + i], u[12 + i], 0x88), d = _mm512_shuffle_f32x4(u[8 + i], u[12 + i], 0xdd);
    v[i] = _mm512_shuffle_f32x4(a, c, 0x88);
    v[8 + i] = _mm512_shuffle_f32x4(a, c, 0xdd);
    v[4 + i] = _mm512_shuffle_f32x4(b, d, 0x88);
    v[12 + i] = _mm512_shuffle_f32x4(b, d, 0xdd);
  }
}

}  // namespace DISTKV_ISA
}  // namespace distkv
