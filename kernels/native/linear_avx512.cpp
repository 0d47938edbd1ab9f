// Linears with few rows on AVX-512, in fp32: a bf16 is the upper half of an fp32.
#define DISTKV_ISA avx512
#include <immintrin.h>

#include "linear_rows.h"

namespace distkv {
namespace DISTKV_ISA {
namespace {

struct Wide {
  struct Weights {
    __m512 even[2], odd[2];
  };
  __m512 even[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()}, odd[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};

  static Weights weights(const uint16_t* at) {
    Weights found;
    DISTKV_UNROLL
    for (int i = 0; i < 2; ++i) {
      const __m512i both = _mm512_loadu_si512(at + 32 * i);
      found.even[i] = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
      found.odd[i] = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
    }
    return found;
  }
  static const float* row(const LinearCall& call, int64_t r) { return call.wide + r * call.pairs() * 2; }
  void add(const Weights& both, const float* pair) {
    const __m512 first = _mm512_set1_ps(pair[0]), second = _mm512_set1_ps(pair[1]);
    DISTKV_UNROLL
    for (int i = 0; i < 2; ++i) {
      even[i] = _mm512_fmadd_ps(first, both.even[i], even[i]);
      odd[i] = _mm512_fmadd_ps(second, both.odd[i], odd[i]);
    }
  }
  void store(float* to) const {
    DISTKV_UNROLL
    for (int i = 0; i < 2; ++i) _mm512_store_ps(to + 16 * i, _mm512_add_ps(even[i], odd[i]));
  }
};

}  // namespace
}  // namespace DISTKV_ISA

const LinearKernels kLinearAvx512 = {"avx512", true, DISTKV_ISA::panels<DISTKV_ISA::Wide>};
}  // namespace distkv
