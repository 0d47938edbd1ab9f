// Arithmetic with a bf16 dot product: pairs of bf16 products summed in fp32.
//
// The streaming kernel uses it for scores only. It is limited by memory: weighting values in fp32 takes no extra time, and
// rounding the weights to bf16 would cost accuracy.
#pragma once
#include "pack_pairs.h"

namespace distkv {
namespace DISTKV_ISA {

struct Bf16 : PackedPairs {
  using Vec = Pairs;
  using Tiles = RegisterTile;

  static Vec load_packed(const bf16* p) { return load_pairs(p); }
  static Vec broadcast(const bf16* p) { return broadcast_pair(p); }
  static F multiply_add(F sum, Vec a, Vec b) { return dot(sum, a, b); }
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
      for (; c + 2 * W <= d; c += 2 * W) {
        Pairs key[4];
        DISTKV_UNROLL
        for (int t = 0; t < 4; ++t) key[t] = load_pairs(row[t] + c);
        ahead.pull(16 * W);
        accumulate<R>(sum, q + c, stride, key);
      }
      if (c < d) {
        Pairs key[4];
        DISTKV_UNROLL
        for (int t = 0; t < 4; ++t) key[t] = load_pairs(row[t] + c, d - c);
        ahead.pull(16 * W);
        accumulate<R>(sum, q + c, stride, key);
      }
      DISTKV_UNROLL
      for (int r = 0; r < R; ++r) sum4(sum[r][0], sum[r][1], sum[r][2], sum[r][3], s + r * kChunk + j);
    }
  }

 private:
  template <int R>
  static inline void accumulate(F (&sum)[R][4], const bf16* q, int stride, const Pairs (&key)[4]) {
    DISTKV_UNROLL
    for (int r = 0; r < R; ++r) {
      const Pairs x = load_pairs(q + r * stride);
      DISTKV_UNROLL
      for (int t = 0; t < 4; ++t) sum[r][t] = dot(sum[r][t], x, key[t]);
    }
  }
};

}  // namespace DISTKV_ISA
}  // namespace distkv
