// The operations between matrix products, with AVX-512.
#define DISTKV_ISA avx512_elementwise
#include "simd_avx512.h"

namespace distkv {
namespace DISTKV_ISA {

// To the nearest, ties to even; NaN stays NaN.
static inline __m512i rounded_bits(F x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i last = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(last, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  return _mm512_mask_or_epi32(up, nan, bits, _mm512_set1_epi32(64 << 16));
}
static inline void narrow(F x, uint16_t* to) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded_bits(x), 16)));
}
static inline F rounded_once(F x) {
  return _mm512_castsi512_ps(_mm512_and_si512(rounded_bits(x), _mm512_set1_epi32(static_cast<int>(0xffff0000))));
}

}  // namespace DISTKV_ISA
}  // namespace distkv

#include "elementwise.h"

namespace distkv {
const Elementwise kElementwiseAvx512 = DISTKV_ELEMENTWISE("avx512");
}
