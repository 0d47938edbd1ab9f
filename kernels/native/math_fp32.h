// Arithmetic in fp32 for KV of any type: every element is widened when it is read.
#pragma once

namespace distkv {
namespace DISTKV_ISA {

constexpr int kChunk = 64;  // tokens that the streaming kernel scores at a time

// Walks a region that will be needed a block later and prefetches its cache lines.
struct Ahead {
  const char* at;
  const char* end;
  void pull(int64_t bytes) {
    const char* stop = at + bytes < end ? at + bytes : end;
    if (kAskIntoFirstLevel) {
      for (; at < stop; at += 64) __builtin_prefetch(at, 0, 3);
    } else {
      for (; at < stop; at += 64) __builtin_prefetch(at, 0, 2);
    }
  }
};

template <class Kv>
struct Fp32 {
  using Cache = Kv;
  using Query = float;    // stored query rows and, in the tile kernel, packed keys and values
  using Weight = float;   // stored softmax weights
  using Vec = F;
  using Tiles = RegisterTile;
  static constexpr int kStep = 1;    // elements that one multiply-accumulate consumes per lane
  static constexpr bool kExact = sizeof(Kv) != 2;  // int8 values are exact too, their scales are fp32

  static Vec load_packed(const float* p) { return load(p); }
  static Vec broadcast(const float* p) { return set1(*p); }
  static F multiply_add(F sum, Vec a, Vec b) { return fma(a, b, sum); }
  static void store_weights(float* p, F x) { store(p, x); }

  template <class T>
  static void pack_query(float* to, const T* q, int d) {
    int c = 0;
    for (; c + W <= d; c += W) store(to + c, load_kv(q + c));
    if (c < d) store(to + c, load_part(q + c, d - c));
  }

  // s[r * kChunk + j] = q[r] . k[j] for R query rows and n tokens; writes up to the next multiple of 4 tokens.
  template <int R, int D>
  static void scores(const float* q, int stride, const Kv* k, int n, int any_d, float* s, Ahead& ahead) {
    const int d = D ? D : any_d;
    for (int j = 0; j < n; j += 4) {
      const Kv* row[4];
      DISTKV_UNROLL
      for (int t = 0; t < 4; ++t) row[t] = k + (int64_t)(j + t < n ? j + t : n - 1) * d;
      F sum[R][4];
      DISTKV_UNROLL
      for (int r = 0; r < R; ++r)
        DISTKV_UNROLL
        for (int t = 0; t < 4; ++t) sum[r][t] = zero();
      int c = 0;
      for (; c + W <= d; c += W) {
        F key[4];
        DISTKV_UNROLL
        for (int t = 0; t < 4; ++t) key[t] = load_kv(row[t] + c);
        ahead.pull(4 * W * sizeof(Kv));
        accumulate<R>(sum, q + c, stride, key);
      }
      if (c < d) {
        F key[4];
        DISTKV_UNROLL
        for (int t = 0; t < 4; ++t) key[t] = load_part(row[t] + c, d - c);
        ahead.pull(4 * W * sizeof(Kv));
        accumulate<R>(sum, q + c, stride, key);
      }
      DISTKV_UNROLL
      for (int r = 0; r < R; ++r) sum4(sum[r][0], sum[r][1], sum[r][2], sum[r][3], s + r * kChunk + j);
    }
  }

  // acc[r] += sum over n tokens of p[r][j] * v[j], whose values of d numbers lie `token` apart
  template <int R, int D>
  static void weigh(const float* p, const Kv* v, int n, int any_d, int any_token, float* acc, int any_stride,
                    Ahead& ahead) {
    const int d = D ? D : any_d, token = D ? D : any_token, stride = D ? (D + 31) / 32 * 32 : any_stride;
    constexpr int C = 4;
    int c = 0;
    for (; c + C * W <= d; c += C * W) weigh_columns<R, C>(p, v + c, n, token, C * W, acc + c, stride, ahead);
    for (; c < d; c += W) weigh_columns<R, 1>(p, v + c, n, token, d - c, acc + c, stride, ahead);
  }

  // W tokens' keys, transposed: element c of token j goes to to[c * panel + j].
  static void pack_keys(float* to, const Kv* const* row, const float* scale, int d, int, int panel) {
    for (int c = 0; c < d; c += W) {
      F x[W];
      DISTKV_UNROLL
      for (int j = 0; j < W; ++j)
        x[j] = mul(c + W <= d ? load_kv(row[j] + c) : load_part(row[j] + c, d - c), set1(scale[j]));
      transpose(x);
      DISTKV_UNROLL
      for (int i = 0; i < W; ++i) store(to + (c + i) * panel, x[i]);
    }
  }

  // One token's values, cut into panels that lie `size` elements apart.
  static void pack_values(float* to, const Kv* const* row, const float* scale, int d, int panel, int size) {
    for (int c = 0; c < d; c += W)
      store(to + c / panel * size + c % panel,
            mul(c + W <= d ? load_kv(row[0] + c) : load_part(row[0] + c, d - c), set1(scale[0])));
  }

 private:
  template <int R>
  static inline void accumulate(F (&sum)[R][4], const float* q, int stride, const F (&key)[4]) {
    DISTKV_UNROLL
    for (int r = 0; r < R; ++r) {
      const F x = load(q + r * stride);
      DISTKV_UNROLL
      for (int t = 0; t < 4; ++t) sum[r][t] = fma(x, key[t], sum[r][t]);
    }
  }

  template <int R, int C>
  static void weigh_columns(const float* p, const Kv* v, int n, int token, int left, float* acc, int stride,
                            Ahead& ahead) {
    F sum[R][C];
    DISTKV_UNROLL
    for (int r = 0; r < R; ++r)
      DISTKV_UNROLL
      for (int c = 0; c < C; ++c) sum[r][c] = load(acc + r * stride + c * W);
    for (int j = 0; j < n; ++j) {
      ahead.pull((int64_t)C * W * sizeof(Kv));
      F value[C];
      DISTKV_UNROLL
      for (int c = 0; c < C; ++c)
        value[c] = left < W ? load_part(v + (int64_t)j * token, left) : load_kv(v + (int64_t)j * token + c * W);
      DISTKV_UNROLL
      for (int r = 0; r < R; ++r) {
        const F weight = set1(p[r * kChunk + j]);
        DISTKV_UNROLL
        for (int c = 0; c < C; ++c) sum[r][c] = fma(weight, value[c], sum[r][c]);
      }
    }
    DISTKV_UNROLL
    for (int r = 0; r < R; ++r)
      DISTKV_UNROLL
      for (int c = 0; c < C; ++c) store(acc + r * stride + c * W, sum[r][c]);
  }
};

}  // namespace DISTKV_ISA
}  // namespace distkv
