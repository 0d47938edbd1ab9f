// Pairs of bf16 in vectors of 512 bits.
#pragma once
#include "simd_avx512.h"

namespace distkv {
namespace DISTKV_ISA {

using Pairs = __m512bh;  // W pairs

static inline __mmask32 pair_lanes(int n) { return n >= 32 ? ~0u : n <= 0 ? 0u : (1u << n) - 1; }
static inline Pairs load_pairs(const bf16* p) { return (Pairs)_mm512_loadu_si512(p); }
// Only the first n numbers are read or written; what is not read is zero.
static inline Pairs load_pairs(const bf16* p, int n) {
  return n >= 32 ? load_pairs(p) : (Pairs)_mm512_maskz_loadu_epi16(pair_lanes(n), p);
}
static inline void store_pairs(bf16* p, Pairs x, int n) { _mm512_mask_storeu_epi16(p, pair_lanes(n), (__m512i)x); }
static inline F as_floats(Pairs x) { return _mm512_castsi512_ps((__m512i)x); }  // the bits

// Rows x and y of values as (x0, y0), (x1, y1), ...: the pairs of columns [0, W) and of columns [W, 2 W).
static inline void interleave(Pairs x, Pairs y, bf16* low, bf16* high) {
  alignas(64) static const uint16_t kOrder[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                  8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i first = _mm512_load_si512(kOrder), second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
  _mm512_storeu_si512(low, _mm512_permutex2var_epi16((__m512i)x, first, (__m512i)y));
  if (high) _mm512_storeu_si512(high, _mm512_permutex2var_epi16((__m512i)x, second, (__m512i)y));
}

static inline void narrow(bf16* p, F x) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(x)); }

static inline Pairs broadcast_pair(const bf16* p) {
  int32_t pair;
  __builtin_memcpy(&pair, p, 4);
  return (Pairs)_mm512_set1_epi32(pair);
}
static inline F dot(F sum, Pairs a, Pairs b) { return _mm512_dpbf16_ps(sum, a, b); }

}  // namespace DISTKV_ISA
}  // namespace distkv
