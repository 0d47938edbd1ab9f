// Arithmetic with AVX-512's bf16 dot product: pairs of bf16 products summed in fp32.
//
// The streaming kernel uses it for scores only. There memory is the limit: weighing values in fp32 costs no time, and
// rounding the weights to bf16 would cost accuracy.
#pragma once

namespace distkv {
namespace DISTKV_ISA {

struct Bf16 {
  using Cache = bf16;
  using Query = bf16;
  using Weight = bf16;
  using Vec = __m512bh;
  static constexpr int kStep = 2;
  static constexpr bool kExact = false;

  static Vec raw(const bf16* p) { return (Vec)_mm512_loadu_si512(p); }
  static __mmask32 lanes(int n) { return (__mmask32)((1ull << n) - 1); }
  static Vec raw_part(const bf16* p, int n) { return (Vec)_mm512_maskz_loadu_epi16(lanes(n), p); }
  static Vec load_packed(const bf16* p) { return raw(p); }
  static Vec broadcast(const bf16* p) {
    int32_t pair;
    __builtin_memcpy(&pair, p, 4);
    return (Vec)_mm512_set1_epi32(pair);
  }
  static F multiply_add(F sum, Vec a, Vec b) { return _mm512_dpbf16_ps(sum, a, b); }
  static void store_weights(bf16* p, F x) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(x)); }

  static void pack_query(bf16* to, const bf16* q, int d) {
    int c = 0;
    for (; c + 32 <= d; c += 32) _mm512_storeu_si512(to + c, (__m512i)raw(q + c));
    if (c < d) _mm512_mask_storeu_epi16(to + c, lanes(d - c), (__m512i)raw_part(q + c, d - c));
  }

  // 16 tokens' keys, transposed in pairs: elements 2i and 2i + 1 of token j go to to[i * 2 * panel + 2j].
  static void pack_keys(bf16* to, const bf16* const* row, const float*, int d, int panel) {
    for (int c = 0; c < d; c += 32) {
      const int left = d - c;
      F x[16];
      DISTKV_UNROLL
      for (int j = 0; j < 16; ++j)
        x[j] = _mm512_castsi512_ps((__m512i)(left < 32 ? raw_part(row[j] + c, left) : raw(row[j] + c)));
      transpose(x);
      const int pairs = left < 32 ? (left + 15) / 16 * 8 : 16;
      for (int i = 0; i < pairs; ++i) store((float*)(to + (c + 2 * i) * panel), x[i]);
    }
  }

  // Two tokens' values interleaved, cut into panels that lie `size` elements apart.
  static void pack_values(bf16* to, const bf16* const* row, const float*, int d, int panel, int size) {
    alignas(64) static const uint16_t kOrder[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                    8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i low = _mm512_load_si512(kOrder), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    for (int c = 0; c < d; c += 32) {
      const int left = d - c;
      const __m512i x = (__m512i)(left < 32 ? raw_part(row[0] + c, left) : raw(row[0] + c));
      const __m512i y = (__m512i)(left < 32 ? raw_part(row[1] + c, left) : raw(row[1] + c));
      bf16* at = to + c / panel * size + c % panel * 2;
      _mm512_storeu_si512(at, _mm512_permutex2var_epi16(x, low, y));
      if (left > 16) _mm512_storeu_si512(at + 32, _mm512_permutex2var_epi16(x, high, y));
    }
  }
};

struct Bf16Scores : Fp32<bf16> {
  using Query = bf16;
  static constexpr int kStep = 2;

  static void pack_query(bf16* to, const bf16* q, int d) { Bf16::pack_query(to, q, d); }

  template <int R, int D>
  static void scores(const bf16* q, int stride, const bf16* k, int n, int any_d, float* s, Ahead& ahead) {
    const int d = D ? D : any_d;
    for (int j = 0; j < n; j += 4) {
      const bf16* row[4];
      DISTKV_UNROLL
      for (int t = 0; t < 4; ++t) row[t] = k + (int64_t)(j + t < n ? j + t : n - 1) * d;
      F sum[R][4];
      DISTKV_UNROLL
      for (int r = 0; r < R; ++r)
        DISTKV_UNROLL
        for (int t = 0; t < 4; ++t) sum[r][t] = zero();
      int c = 0;
      for (; c + 32 <= d; c += 32) {
        Bf16::Vec key[4];
        DISTKV_UNROLL
        for (int t = 0; t < 4; ++t) key[t] = Bf16::raw(row[t] + c);
        ahead.pull(256);
        accumulate<R>(sum, q + c, stride, key);
      }
      if (c < d) {
        Bf16::Vec key[4];
        DISTKV_UNROLL
        for (int t = 0; t < 4; ++t) key[t] = Bf16::raw_part(row[t] + c, d - c);
        ahead.pull(256);
        accumulate<R>(sum, q + c, stride, key);
      }
      DISTKV_UNROLL
      for (int r = 0; r < R; ++r) sum4(sum[r][0], sum[r][1], sum[r][2], sum[r][3], s + r * kChunk + j);
    }
  }

 private:
  template <int R>
  static inline void accumulate(F (&sum)[R][4], const bf16* q, int stride, const Bf16::Vec (&key)[4]) {
    DISTKV_UNROLL
    for (int r = 0; r < R; ++r) {
      const Bf16::Vec x = Bf16::raw(q + r * stride);
      DISTKV_UNROLL
      for (int t = 0; t < 4; ++t) sum[r][t] = _mm512_dpbf16_ps(sum[r][t], x, key[t]);
    }
  }
};

}  // namespace DISTKV_ISA
}  // namespace distkv
