// Arithmetic with AVX-512's bf16 dot product: pairs of bf16 products summed in fp32.
#pragma once

namespace distkv {
namespace DISTKV_ISA {

struct Bf16 {
  using Cache = bf16;
  using Query = bf16;
  using Weight = bf16;
  using Vec = __m512bh;
  static constexpr int kStep = 2;
  static constexpr int kWidth = 32;
  static constexpr bool kExact = false;

  static Vec raw(const bf16* p) { return (Vec)_mm512_loadu_si512(p); }
  static Vec raw_part(const bf16* p, int n) { return (Vec)_mm512_maskz_loadu_epi16((__mmask32)((1ull << n) - 1), p); }
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
    if (c < d) _mm512_storeu_si512(to + c, (__m512i)raw_part(q + c, d - c));
  }

  template <int R, int D>
  static void scores(const bf16* q, int stride, const bf16* k, int n, int any_d, float* s, Ahead& ahead) {
    const int d = D ? D : any_d;
    for (int j = 0; j < n; j += 4) {
      const bf16* row[4];
      DISTKV_UNROLL
      for (int t = 0; t < 4; ++t) row[t] = k + (int64_t)(j + t < n ? j + t : n - 1) * d;
      ahead.pull((int64_t)8 * d);
      F sum[R][4];
      DISTKV_UNROLL
      for (int r = 0; r < R; ++r)
        DISTKV_UNROLL
        for (int t = 0; t < 4; ++t) sum[r][t] = zero();
      int c = 0;
      for (; c + 32 <= d; c += 32) {
        Vec key[4];
        DISTKV_UNROLL
        for (int t = 0; t < 4; ++t) key[t] = raw(row[t] + c);
        accumulate<R>(sum, q + c, stride, key);
      }
      if (c < d) {
        Vec key[4];
        DISTKV_UNROLL
        for (int t = 0; t < 4; ++t) key[t] = raw_part(row[t] + c, d - c);
        accumulate<R>(sum, q + c, stride, key);
      }
      DISTKV_UNROLL
      for (int r = 0; r < R; ++r) sum4(sum[r][0], sum[r][1], sum[r][2], sum[r][3], s + r * kChunk + j);
    }
  }

  // Two tokens at a time: their rows are interleaved, which leaves acc in the order of unpacklo and unpackhi
  // (undone in finish). p holds a zero after an odd number of tokens.
  template <int R, int D>
  static void weigh(const bf16* p, const bf16* v, int n, int any_d, float* acc, int any_stride, Ahead& ahead) {
    const int d = D ? D : any_d, stride = D ? (D + 31) / 32 * 32 : any_stride;
    int c = 0;
    for (; c + 64 <= d; c += 64) weigh_columns<R, 2>(p, v + c, n, d, 64, acc + c, stride, ahead);
    for (; c < d; c += 32) weigh_columns<R, 1>(p, v + c, n, d, d - c, acc + c, stride, ahead);
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

  static void finish(float* out, const float* acc, float inverse, int d) {
    const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    for (int c = 0; c < d; c += 32) {
      const F a = mul(load(acc + c), set1(inverse)), b = mul(load(acc + c + 16), set1(inverse));
      const F first = _mm512_permutex2var_ps(a, low, b), second = _mm512_permutex2var_ps(a, high, b);
      const int left = d - c;
      _mm512_mask_storeu_ps(out + c, lanes(left < 16 ? left : 16), first);
      if (left > 16) _mm512_mask_storeu_ps(out + c + 16, lanes(left < 32 ? left - 16 : 16), second);
    }
  }

 private:
  template <int R>
  static inline void accumulate(F (&sum)[R][4], const bf16* q, int stride, const Vec (&key)[4]) {
    DISTKV_UNROLL
    for (int r = 0; r < R; ++r) {
      const Vec x = raw(q + r * stride);
      DISTKV_UNROLL
      for (int t = 0; t < 4; ++t) sum[r][t] = _mm512_dpbf16_ps(sum[r][t], x, key[t]);
    }
  }

  template <int R, int C>
  static void weigh_columns(const bf16* p, const bf16* v, int n, int d, int left, float* acc, int stride,
                            Ahead& ahead) {
    F sum[R][2 * C];
    DISTKV_UNROLL
    for (int r = 0; r < R; ++r)
      DISTKV_UNROLL
      for (int c = 0; c < 2 * C; ++c) sum[r][c] = load(acc + r * stride + c * 16);
    for (int j = 0; j < n; j += 2) {
      const bf16 *a = v + (int64_t)j * d, *b = j + 1 < n ? a + d : a;
      ahead.pull((int64_t)C * 128);
      Vec value[2 * C];
      DISTKV_UNROLL
      for (int c = 0; c < C; ++c) {
        const __m512i x = (__m512i)(left < 32 ? raw_part(a, left) : raw(a + c * 32));
        const __m512i y = (__m512i)(left < 32 ? raw_part(b, left) : raw(b + c * 32));
        value[2 * c] = (Vec)_mm512_unpacklo_epi16(x, y);
        value[2 * c + 1] = (Vec)_mm512_unpackhi_epi16(x, y);
      }
      DISTKV_UNROLL
      for (int r = 0; r < R; ++r) {
        const Vec weight = broadcast(p + r * kChunk + j);
        DISTKV_UNROLL
        for (int c = 0; c < 2 * C; ++c) sum[r][c] = _mm512_dpbf16_ps(sum[r][c], weight, value[c]);
      }
    }
    DISTKV_UNROLL
    for (int r = 0; r < R; ++r)
      DISTKV_UNROLL
      for (int c = 0; c < 2 * C; ++c) store(acc + r * stride + c * 16, sum[r][c]);
  }
};

}  // namespace DISTKV_ISA
}  // namespace distkv
