// MicroAttention for many queries: packed keys and values, and matrix products on register tiles.
//
// One item is a tile of query rows (a few queries of every head of a group) of one kv head. It walks the keys in chunks;
// a chunk's keys are packed [head dim, token] and its values [token, head dim], in pairs for the bf16 dot product,
// so that both products broadcast the left side and read the right side in full vectors. Nothing that causality or a
// window hides is computed, down to register tiles.
#pragma once

namespace distkv {
namespace DISTKV_ISA {

constexpr int kTileTokens = 128;         // tokens per chunk
constexpr int kTileRows = 6;             // query rows of a register tile
constexpr int kPanel = kColumns * W;     // columns of a packed panel

// c[m][n] (+)= a[m] . b over `steps`, for one register tile; the panel b holds kPanel columns per step.
template <class M, int Rows, int Columns, bool Add>
static inline void product(const typename M::Query* a, int64_t lda, const typename M::Query* b, int steps, float* c,
                           int64_t ldc) {
  F sum[Rows][Columns];
  DISTKV_UNROLL
  for (int m = 0; m < Rows; ++m)
    DISTKV_UNROLL
    for (int n = 0; n < Columns; ++n) sum[m][n] = Add ? load(c + m * ldc + n * W) : zero();
  for (int k = 0; k < steps; ++k, b += kPanel * M::kStep, a += M::kStep) {
    typename M::Vec right[Columns];
    DISTKV_UNROLL
    for (int n = 0; n < Columns; ++n) right[n] = M::load_packed(b + n * W * M::kStep);
    DISTKV_UNROLL
    for (int m = 0; m < Rows; ++m) {
      const typename M::Vec left = M::broadcast(a + m * lda);
      DISTKV_UNROLL
      for (int n = 0; n < Columns; ++n) sum[m][n] = M::multiply_add(sum[m][n], left, right[n]);
    }
  }
  DISTKV_UNROLL
  for (int m = 0; m < Rows; ++m)
    DISTKV_UNROLL
    for (int n = 0; n < Columns; ++n) store(c + m * ldc + n * W, sum[m][n]);
}

template <class M, int Rows, bool Add>
static void product_columns(int columns, const typename M::Query* a, int64_t lda, const typename M::Query* b,
                            int steps, float* c, int64_t ldc) {
  switch (columns) {
    case 1: return product<M, Rows, 1, Add>(a, lda, b, steps, c, ldc);
    case 2: return product<M, Rows, 2, Add>(a, lda, b, steps, c, ldc);
    case 3: return product<M, Rows, kColumns < 3 ? kColumns : 3, Add>(a, lda, b, steps, c, ldc);
    default: return product<M, Rows, kColumns, Add>(a, lda, b, steps, c, ldc);
  }
}

// The last register tile may hold fewer rows: 16 questions of group 4 are ten tiles of 6 and one of 4.
template <class M, bool Add>
static void product_rows(int rows, int columns, const typename M::Query* a, int64_t lda, const typename M::Query* b,
                         int steps, float* c, int64_t ldc) {
  if (rows <= 2) return product_columns<M, 2, Add>(columns, a, lda, b, steps, c, ldc);
  if (rows <= 4) return product_columns<M, 4, Add>(columns, a, lda, b, steps, c, ldc);
  return product_columns<M, kTileRows, Add>(columns, a, lda, b, steps, c, ldc);
}

template <class M>
struct Tile {
  using Kv = typename M::Cache;
  using Query = typename M::Query;

  static int64_t depth(const Args& a) { return round_up(a.d, W); }        // of the score product, padded with zeros
  static int64_t width(const Args& a) { return round_up(a.d_v, kPanel); }  // of the output, whole panels
  static int64_t padded_rows(const Args& a, int64_t queries) {
    return round_up(queries * (a.heads / a.kv_heads), kTileRows);
  }

  static int64_t bytes(const Args& a, int64_t queries) {
    const int64_t rows = padded_rows(a, queries);
    const int64_t per_row = depth(a) * 4 + kTileTokens * 8 + width(a) * 4 + 32;
    return rows * per_row + kTileTokens * (depth(a) + width(a)) * 4 + 1024;
  }

  // One token after the other, through the block table.
  struct Walk {
    const Args* a = nullptr;
    const int32_t* table = nullptr;
    int64_t head = 0, block = 0, inside = 0;

    Walk() = default;
    Walk(const Args& args, const Item& it, int64_t token)
        : a(&args), table(it.table + token / args.block_tokens), head(it.head), block(*table),
          inside(token % args.block_tokens) {}
    void next() {
      if (++inside < a->block_tokens) return;
      inside = 0;
      block = *++table;
    }
    int64_t place() const { return head * a->block_tokens + inside; }
    const Kv* key() const { return (const Kv*)a->k + block * a->k_block + place() * a->d; }
    const Kv* value() const { return (const Kv*)a->v + block * a->v_block + place() * a->v_token; }
  };

  const Args& a;
  const Item& it;
  const int group, used, rows;  // `used` rows hold queries
  const int64_t deep, wide;
  Query *q, *k, *v;             // packed queries, keys, values
  float *s, *acc, *top, *sum;   // scores, unnormalised output, and the running softmax of each row
  int64_t *from, *limit;        // first and last token that each row sees; padding rows see what the last one sees
  int64_t* tile_from;           // first token that a row of the same register tile sees
  typename M::Weight* p;        // weights [rows, kTileTokens]
  Walk ahead;                   // next token to look ahead at, and how many are left
  int64_t ahead_left = 0;

  Tile(const Args& args, const Item& item, char* scratch)
      : a(args), it(item), group((int)(a.heads / a.kv_heads)), used((int)it.queries * group),
        rows((int)padded_rows(a, it.queries)), deep(depth(a)), wide(width(a)) {
    s = (float*)scratch;
    acc = s + rows * kTileTokens;
    k = (Query*)(acc + rows * wide);
    v = k + kTileTokens * deep;
    p = (typename M::Weight*)(v + kTileTokens * wide);
    q = (Query*)(p + rows * kTileTokens);
    top = (float*)(q + rows * deep);
    sum = top + rows;
    limit = (int64_t*)(sum + rows);
    from = limit + rows;
    tile_from = from + rows;
  }

  static void run(const Args& a, const Item& it, char* scratch) { Tile(a, it, scratch).attend(); }

 private:
  void attend() {
    start();
    for (int64_t token = it.first; token < it.last; token += kTileTokens) {
      const int n = (int)(it.last - token < kTileTokens ? it.last - token : kTileTokens);
      if (visible(rows - 1, token, n) == 0) break;
      pack_chunk(token, n);
      ahead_left = it.last - token - n < kTileTokens ? it.last - token - n : kTileTokens;
      if (ahead_left > 0) ahead = Walk(a, it, token + n);
      for (int j = 0; j < n; j += kPanel)
        for (int r = 0; r < rows; r += kTileRows) score(r, j, token, n);
      for (int r = 0; r < used; ++r) soften_row(r, token, n);
      for (int c = 0; c < a.d_v; c += kPanel)
        for (int r = 0; r < rows; r += kTileRows) weigh(r, c, token, n);
    }
    finish();
  }

  // Tokens of the chunk that are not past what query row r sees, and those that its register tile computes.
  int visible(int r, int64_t token, int n) const { return clamp(limit[r] - token + 1, n); }
  int skipped(int r, int64_t token, int n) const { return clamp(tile_from[r] - token, n) / 16 * 16; }
  int padded(int r, int64_t token, int n) const {
    return (int)round_up(visible(r - r % kTileRows + kTileRows - 1, token, n), 16);
  }

  void start() {
    for (int r = 0; r < rows; ++r) {
      const int query = r < used ? r / group : (int)it.queries - 1;
      limit[r] = it.limit + query;
      from[r] = it.first_keys ? it.first_keys[query] : 0;
      for (int64_t c = r < used ? a.d : 0; c < deep; ++c) q[r * deep + c] = {};
      if (r < used) pack_query<M>(q + r * deep, a, (it.query + query) * a.heads + it.head * group + r % group);
      for (int64_t c = 0; c < wide; c += W) store(acc + r * wide + c, zero());
      top[r] = -INFINITY;
      sum[r] = 0;
    }
    for (int64_t i = used * kTileTokens; i < rows * kTileTokens; ++i) p[i] = {};
    for (int r = 0; r < rows; ++r) {
      tile_from[r] = from[r];
      for (int i = r - r % kTileRows; i < r - r % kTileRows + kTileRows; ++i)
        if (from[i] < tile_from[r]) tile_from[r] = from[i];
    }
  }

  void pack_chunk(int64_t token, int n) {
    const int whole = (int)round_up(n, 16);
    const Kv *keys[kTileTokens], *values[kTileTokens];
    float key_scale[kTileTokens], value_scale[kTileTokens];
    Walk walk(a, it, token);
    for (int j = 0; j < whole; ++j) {
      keys[j] = walk.key();
      values[j] = walk.value();
      key_scale[j] = a.k_scales ? a.k_scales[walk.block * a.kv_heads + it.head] : 1.0f;
      value_scale[j] = a.v_scales ? a.v_scales[walk.block * a.kv_heads + it.head] : 1.0f;
      if (j + 1 < n) walk.next();  // what follows the last token repeats it, and is masked
    }
    for (int j = 0; j < whole; j += W)
      M::pack_keys(k + j / kPanel * kPanel * deep + j % kPanel * M::kStep, keys + j, key_scale + j, (int)a.d, kPanel);
    for (int j = 0; j < whole; j += M::kStep)
      M::pack_values(v + (int64_t)j * kPanel, values + j, value_scale + j, (int)a.d_v, kPanel, kTileTokens * kPanel);
  }

  // Pulls a few tokens of the next chunk into the second-level cache while this one is computed.
  void look_ahead() {
    const int64_t key_bytes = a.d * (int64_t)sizeof(Kv);
    const int64_t value_bytes = a.values_in_keys() ? 0 : a.d_v * (int64_t)sizeof(Kv);
    for (int i = 0; i < 4 && ahead_left > 0; ++i, --ahead_left) {
      const char *key = (const char*)ahead.key(), *value = (const char*)ahead.value();
      for (int64_t line = 0; line < key_bytes; line += 64) __builtin_prefetch(key + line, 0, 2);
      for (int64_t line = 0; line < value_bytes; line += 64) __builtin_prefetch(value + line, 0, 2);
      if (ahead_left > 1) ahead.next();
    }
  }

  // One panel of keys (from token j of the chunk) or values (from column c) against one register tile of rows.
  void score(int r, int j, int64_t token, int n) {
    const int seen = padded(r, token, n);
    if (j >= seen || j + kPanel <= skipped(r, token, n)) return;
    look_ahead();
    const int columns = seen - j < kPanel ? (seen - j) / W : kColumns;
    product_rows<M, false>(used - r, columns, q + r * deep, deep, k + j * deep, (int)deep / M::kStep,
                                         s + r * kTileTokens + j, kTileTokens);
  }
  void weigh(int r, int c, int64_t token, int n) {
    const int columns = a.d_v - c < kPanel ? (int)round_up(a.d_v - c, W) / W : kColumns;
    const int first = skipped(r, token, n), steps = (padded(r, token, n) - first) / M::kStep;
    look_ahead();
    if (steps > 0)
      product_rows<M, true>(used - r, columns, p + r * kTileTokens + first, kTileTokens,
                            v + c * kTileTokens + first * kPanel, steps, acc + r * wide + c, wide);
  }

  // Weights of a query row for the tokens that its register tile computes.
  void soften_row(int r, int64_t token, int n) {
    const int first = skipped(r, token, n), count = padded(r, token, n) - first;
    if (count <= 0) return;
    float* scores = s + r * kTileTokens + first;
    const Factors factors(a, 1);  // keys were scaled when they were packed
    factors.cap(scores, count);
    const int last = visible(r, token, n) - first;
    const Range seen = {clamp(from[r] - token, n) - first, last < 0 ? 0 : last};
    soften<M>(scores, p + r * kTileTokens + first, seen, count, factors.outer, 1.0f, acc + r * wide, (int)wide, top[r],
              sum[r]);
  }

  void finish() {
    for (int r = 0; r < used; ++r) {
      const int64_t to = r / group * a.heads + it.head * group + r % group;
      conclude(acc + r * wide, top[r], sum[r], (int)a.d_v, it.out + to * a.d_v, it.lse + to);
    }
  }
};

}  // namespace DISTKV_ISA
}  // namespace distkv
