// MicroAttention for few queries: every key and value is read from memory once, in place, whatever the group size.
//
// Blocks are the outer loop and heads the inner one, so that memory is read in long runs. This kernel is limited by how
// early memory is prefetched: while one chunk is computed, the chunk about 32 KiB ahead is prefetched into the caches.
// Which cache depends on the processor (kAskIntoFirstLevel).
#pragma once

namespace distkv {
namespace DISTKV_ISA {

constexpr int64_t kAheadBytes = 32 << 10;

static inline int64_t round_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

// Chunks of at most kChunk tokens inside one block, all heads of a chunk before the next.
struct Cursor {
  int64_t token = 0, head = 0, count = 0, block = 0, inside = 0;
  bool valid = false;

  void start(const Args& a, const Item& it) {
    token = it.first;
    head = it.head;
    enter(a, it);
  }
  void next(const Args& a, const Item& it) {
    if (++head < it.head + it.heads) return;
    head = it.head;
    token += count;
    enter(a, it);
  }
  template <class T>
  const T* key(const Args& a) const {
    return (const T*)a.k + block * a.k_block + (head * a.block_tokens + inside) * a.d;
  }
  template <class T>
  const T* value(const Args& a) const {
    return (const T*)a.v + block * a.v_block + (head * a.block_tokens + inside) * a.v_token;
  }

 private:
  void enter(const Args& a, const Item& it) {
    valid = token < it.last;
    if (!valid) return;
    block = it.table[token / a.block_tokens];
    inside = token % a.block_tokens;
    count = a.block_tokens - inside;
    if (count > kChunk) count = kChunk;
    if (count > it.last - token) count = it.last - token;
  }
};

// Weights may grow to 2^kSlack before the accumulator is rescaled: an exact result needs a common reference, not the
// highest score itself.
constexpr float kSlack = 8;

// Tokens [first, last) of a chunk.
struct Range {
  int first, last;
};

// Running softmax of one query row over the scores of the tokens that it sees; weights for [0, n) replace them in p.
template <class M>
static inline void soften(float* s, typename M::Weight* p, Range seen, int n, float score_scale, float value_scale,
                          float* acc, int width, float& top, float& sum) {
  for (int j = 0; j < seen.first; ++j) s[j] = -INFINITY;
  for (int j = seen.last; j < round_up(n, W); ++j) s[j] = -INFINITY;
  F high = set1(-INFINITY);
  for (int j = 0; j < n; j += W) high = max(load(s + j), high);
  const float now = reduce_max(high) * score_scale;
  if (now > top + kSlack) {
    if (top != -INFINITY) {
      const float shrink = __builtin_exp2f(top - now);
      sum *= shrink;
      for (int c = 0; c < width; c += W) store(acc + c, mul(load(acc + c), set1(shrink)));
    }
    top = now;
  }
  const F scale = set1(score_scale), base = set1(top == -INFINITY ? 0.0f : -top), weight_scale = set1(value_scale);
  F total = zero();
  for (int j = 0; j < n; j += W) {
    const F x = exp2<M::kExact>(fma(load(s + j), scale, base));
    total = add(total, x);
    M::store_weights(p + j, mul(x, weight_scale));
  }
  sum += reduce_add(total);
}

// The answer of one query row from its accumulator, the reference of its weights (in units of log2) and their sum.
static inline void conclude(const float* acc, float top, float sum, int d, float* out, float* lse) {
  const bool blind = top == -INFINITY;
  const float inverse = blind ? 0.0f : 1.0f / sum;
  int c = 0;
  for (; c + W <= d; c += W) store(out + c, mul(load(acc + c), set1(inverse)));
  for (; c < d; ++c) out[c] = acc[c] * inverse;
  *lse = blind ? -INFINITY : top * kLn2 + __builtin_logf(sum);
}

// Query row `row` of the call (counted in heads) in the form that M multiplies.
template <class M>
static inline void pack_query(typename M::Query* to, const Args& a, int64_t row) {
  const int d = (int)a.d;
  if constexpr (M::kStep == 2) {
    M::pack_query(to, (const bf16*)a.q + row * d, d);
  } else {
    switch (a.q_dtype) {
      case kBf16: return M::pack_query(to, (const bf16*)a.q + row * d, d);
      case kFp16: return M::pack_query(to, (const fp16*)a.q + row * d, d);
      default: return M::pack_query(to, (const float*)a.q + row * d, d);
    }
  }
}

// D is the head dim, or 0 for one that is only known at run time.
template <class M, int D>
struct Stream {
  using Kv = typename M::Cache;

  static int64_t width(const Args& a) { return round_up(D ? D : a.d, 32); }  // of queries and, as d_v <= d, of answers

  // Scratch: per kv head and query row the packed query, the accumulator, and (top, sum); then one chunk's scores.
  static int64_t bytes(const Args& a, int64_t queries) {
    const int64_t rows = queries * a.heads;
    const int64_t per_head = queries * (a.heads / a.kv_heads) + kRows;
    return rows * (width(a) * 8 + 8) + per_head * kChunk * 8 + 256;
  }

  // Most calls have neither a soft cap nor first keys: their loop does not contain the code for these.
  static void run(const Args& a, const Item& it, char* scratch) {
    a.soft_cap > 0 || it.first_keys ? walk<false>(a, it, scratch) : walk<true>(a, it, scratch);
  }

 private:
  template <bool Plain>
  static void walk(const Args& a, const Item& it, char* scratch) {
    const int64_t group = a.heads / a.kv_heads, rows = it.queries * group, wide = width(a);
    float* acc = (float*)scratch;
    float* s = acc + it.heads * rows * wide;
    auto* p = (typename M::Weight*)(s + rows * kChunk);
    auto* q = (typename M::Query*)((float*)p + rows * kChunk);
    float* top = (float*)(q + it.heads * rows * wide);
    float* sum = top + it.heads * rows;
    pack(a, it, q);
    for (int64_t i = 0; i < it.heads * rows * wide; ++i) acc[i] = 0;
    for (int64_t i = 0; i < it.heads * rows; ++i) top[i] = -INFINITY, sum[i] = 0;

    Cursor now, ahead;
    now.start(a, it);
    ahead.start(a, it);
    for (int64_t done = 0; ahead.valid && done < kAheadBytes; ahead.next(a, it))
      done += ahead.count * (a.values_in_keys() ? a.d : a.d + a.d_v) * (int64_t)sizeof(Kv);
    for (; now.valid; now.next(a, it)) {
      Ahead k{}, v{};
      if (ahead.valid) {
        k.at = (const char*)ahead.key<Kv>(a);
        k.end = k.at + ahead.count * a.d * (int64_t)sizeof(Kv);
        if (!a.values_in_keys()) {
          v.at = (const char*)ahead.value<Kv>(a);
          v.end = v.at + ahead.count * a.v_token * (int64_t)sizeof(Kv);
        }
        ahead.next(a, it);
      }
      const int64_t base = (now.head - it.head) * rows;
      chunk<Plain>(a, it, now, k, v, q + base * wide, acc + base * wide, top + base, sum + base, s, p);
    }
    finish(a, it, acc, top, sum);
  }

  static void pack(const Args& a, const Item& it, typename M::Query* q) {
    const int64_t group = a.heads / a.kv_heads, wide = width(a);
    for (int64_t h = 0; h < it.heads; ++h)
      for (int64_t i = 0; i < it.queries; ++i)
        for (int64_t g = 0; g < group; ++g, q += wide) {
          for (int64_t c = a.d; c < wide; ++c) q[c] = {};
          pack_query<M>(q, a, (it.query + i) * a.heads + (it.head + h) * group + g);
        }
  }

  template <bool Plain>
  static void chunk(const Args& a, const Item& it, const Cursor& at, Ahead& ahead_k, Ahead& ahead_v,
                    const typename M::Query* q, float* acc, float* top, float* sum, float* s, typename M::Weight* p) {
    const Kv *k = at.key<Kv>(a), *v = at.value<Kv>(a);
    const int n = (int)at.count, d = (int)a.d, wide = (int)width(a), group = (int)(a.heads / a.kv_heads);
    const int d_v = (int)a.d_v, v_token = (int)a.v_token;
    const int rows = (int)it.queries * group;
    int r = 0;
    for (; r + kRows <= rows; r += kRows)
      M::template scores<kRows, D>(q + r * wide, wide, k, n, d, s + r * kChunk, ahead_k);
    switch (rows - r) {
      case 3: M::template scores<3, D>(q + r * wide, wide, k, n, d, s + r * kChunk, ahead_k); break;
      case 2: M::template scores<2, D>(q + r * wide, wide, k, n, d, s + r * kChunk, ahead_k); break;
      case 1: M::template scores<1, D>(q + r * wide, wide, k, n, d, s + r * kChunk, ahead_k); break;
    }
    const float value_scale = a.v_scales ? a.v_scales[at.block * a.kv_heads + at.head] : 1;
    const Factors factors(a, !Plain, a.k_scales ? a.k_scales[at.block * a.kv_heads + at.head] : 1);
    for (r = 0; r < rows; ++r) {
      if (!Plain) factors.cap(s + r * kChunk, n);
      const int query = r / group;
      const Range seen = {!Plain && it.first_keys ? clamp(it.first_keys[query] - at.token, n) : 0,
                          clamp(it.limit + query - at.token + 1, n)};
      soften<M>(s + r * kChunk, p + r * kChunk, seen, n, factors.outer, value_scale, acc + r * wide, wide, top[r],
                sum[r]);
    }
    for (r = 0; r + kRows <= rows; r += kRows)
      M::template weigh<kRows, D>(p + r * kChunk, v, n, d_v, v_token, acc + r * wide, wide, ahead_v);
    switch (rows - r) {
      case 3: M::template weigh<3, D>(p + r * kChunk, v, n, d_v, v_token, acc + r * wide, wide, ahead_v); break;
      case 2: M::template weigh<2, D>(p + r * kChunk, v, n, d_v, v_token, acc + r * wide, wide, ahead_v); break;
      case 1: M::template weigh<1, D>(p + r * kChunk, v, n, d_v, v_token, acc + r * wide, wide, ahead_v); break;
    }
  }

  static void finish(const Args& a, const Item& it, const float* acc, const float* top, const float* sum) {
    const int64_t group = a.heads / a.kv_heads, wide = width(a);
    for (int64_t h = 0; h < it.heads; ++h)
      for (int64_t i = 0; i < it.queries; ++i)
        for (int64_t g = 0; g < group; ++g, acc += wide, ++top, ++sum) {
          const int64_t to = i * a.heads + (it.head + h) * group + g;
          conclude(acc, *top, *sum, (int)a.d_v, it.out + to * a.d_v, it.lse + to);
        }
  }
};

}  // namespace DISTKV_ISA
}  // namespace distkv
