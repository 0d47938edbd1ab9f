// Linears with few rows on AVX-512 with its bf16 dot product.
#define DISTKV_ISA avx512_bf16
#include <immintrin.h>

#include "linear_rows.h"

namespace distkv {
namespace DISTKV_ISA {
namespace {

struct Dot {
  struct Weights {
    __m512bh part[2];
  };
  __m512 sum[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};

  static Weights weights(const uint16_t* at) {
    return {{(__m512bh)_mm512_loadu_si512(at), (__m512bh)_mm512_loadu_si512(at + 32)}};
  }
  static const uint16_t* row(const LinearCall& call, int64_t r) { return call.rows + r * call.stride; }
  void add(const Weights& both, const uint16_t* pair) {
    int32_t bits;
    __builtin_memcpy(&bits, pair, 4);
    const __m512bh every = (__m512bh)_mm512_set1_epi32(bits);
    DISTKV_UNROLL
    for (int i = 0; i < 2; ++i) sum[i] = _mm512_dpbf16_ps(sum[i], every, both.part[i]);
  }
  void store(float* to) const {
    DISTKV_UNROLL
    for (int i = 0; i < 2; ++i) _mm512_store_ps(to + 16 * i, sum[i]);
  }
};

}  // namespace
}  // namespace DISTKV_ISA

const LinearKernels kLinearAvx512Bf16 = {"avx512_bf16", false, DISTKV_ISA::panels<DISTKV_ISA::Dot>};
}  // namespace distkv
