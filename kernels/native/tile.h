// MicroAttention for many queries: packed keys and values, and matrix products on tiles (M::Tiles).
//
// One item is a tile of query rows (a few queries of every head of a group) of one kv head. It walks the keys in chunks;
// a chunk's keys are packed [head dim, token] and its values [token, head dim], in pairs for the bf16 dot product,
// so that both products broadcast the left side and read the right side in full vectors. Tiles that causality or a
// window hides are not computed.
#pragma once

namespace distkv {
namespace DISTKV_ISA {

constexpr int kTileTokens = 128;  // tokens per chunk

template <class M>
struct Tile {
  using Kv = typename M::Cache;
  using Query = typename M::Query;
  using Tiles = typename M::Tiles;
  static constexpr int kTileRows = Tiles::kRows, kPanel = Tiles::kPanel;

  static int64_t depth(const Args& a) { return round_up(a.d, Tiles::kDepth); }  // of the score product, padded with zeros
  static int64_t width(const Args& a) { return round_up(a.d_v, kPanel); }       // of the output, whole panels
  static int64_t padded_rows(const Args& a, int64_t queries) {
    return round_up(queries * (a.heads / a.kv_heads), kTileRows);
  }

  // Rows whose scores and weights are kept: if products run beside vectors, those of the last two tiles.
  static int64_t kept_rows(int64_t rows) {
    return Tiles::kBesideVectors && rows > 2 * kTileRows ? 2 * kTileRows : rows;
  }

  static int64_t bytes(const Args& a, int64_t queries) {
    const int64_t rows = padded_rows(a, queries);
    const int64_t per_row = depth(a) * 4 + width(a) * 4 + 32;
    return rows * per_row + kTileTokens * (kept_rows(rows) * 8 + (depth(a) + width(a)) * 4) + 1024;
  }

  // Walks tokens one by one, through the block table.
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
  float *acc, *top, *sum;       // unnormalised output and the running softmax of each row
  int64_t *from, *limit;        // first and last token that each row sees; padding rows see what the last one sees
  int64_t* tile_from;           // first token that a row of the same tile sees
  float* s;                     // scores and weights [kept_rows, kTileTokens]
  typename M::Weight* p;
  Walk ahead;                   // next token to prefetch, and how many are left
  int64_t ahead_left = 0;

  Tile(const Args& args, const Item& item, char* scratch)
      : a(args), it(item), group((int)(a.heads / a.kv_heads)), used((int)it.queries * group),
        rows((int)padded_rows(a, it.queries)), deep(depth(a)), wide(width(a)) {
    const int64_t kept = kept_rows(rows);
    s = (float*)scratch;
    acc = s + kept * kTileTokens;
    k = (Query*)(acc + rows * wide);
    v = k + kTileTokens * deep;
    p = (typename M::Weight*)(v + kTileTokens * wide);
    q = (Query*)(p + kept * kTileTokens);
    top = (float*)(q + rows * deep);
    sum = top + rows;
    limit = (int64_t*)(sum + rows);
    from = limit + rows;
    tile_from = from + rows;
  }

  static void run(const Args& a, const Item& it, char* scratch) { Tile(a, it, scratch).attend(); }

 private:
  void attend() {
    [[maybe_unused]] const typename Tiles::Session session{};
    start();
    for (int64_t token = it.first; token < it.last; token += kTileTokens) {
      const int n = (int)(it.last - token < kTileTokens ? it.last - token : kTileTokens);
      if (visible(rows - 1, token, n) == 0) break;
      pack_chunk(token, n);
      ahead_left = it.last - token - n < kTileTokens ? it.last - token - n : kTileTokens;
      if (ahead_left > 0) ahead = Walk(a, it, token + n);
      Tiles::kBesideVectors ? tile_by_tile(token, n) : panel_by_panel(token, n);
    }
    finish();
  }

  // A panel stays in the first-level cache for all tiles.
  void panel_by_panel(int64_t token, int n) {
    for (int j = 0; j < n; j += kPanel)
      for (int r = 0; r < rows; r += kTileRows) score(r, j, token, n);
    for (int r = 0; r < used; ++r) soften_row(r, token, n);
    for (int c = 0; c < a.d_v; c += kPanel)
      for (int r = 0; r < rows; r += kTileRows) weigh(r, c, token, n);
  }

  // Scores of a tile are multiplied while vectors compute the weights of the tile before it.
  void tile_by_tile(int64_t token, int n) {
    constexpr int kPart = kTileRows * kPanel / kTileTokens;  // rows whose weights are computed beside a panel's scores
    for (int r = -kTileRows; r < rows; r += kTileRows) {
      for (int j = 0, row = r; j < kTileTokens; j += kPanel) {
        if (r + kTileRows < rows && j < n) score(r + kTileRows, j, token, n);
        for (const int end = row + kPart; row < end; ++row)
          if (row >= 0 && row < used) soften_row(row, token, n);
      }
      for (int c = 0; r >= 0 && c < a.d_v; c += kPanel) weigh(r, c, token, n);
    }
  }

  static int64_t place(int r) { return (Tiles::kBesideVectors ? r % (2 * kTileRows) : r) * kTileTokens; }

  // Tokens of the chunk up to the last one that query row r sees, and those that its tile computes.
  int visible(int r, int64_t token, int n) const { return clamp(limit[r] - token + 1, n); }
  int skipped(int r, int64_t token, int n) const { return clamp(tile_from[r] - token, n) / Tiles::kTokens * Tiles::kTokens; }
  int padded(int r, int64_t token, int n) const {
    return (int)round_up(visible(r - r % kTileRows + kTileRows - 1, token, n), Tiles::kTokens);
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
    for (int64_t i = 0; i < kept_rows(rows) * kTileTokens; ++i) p[i] = {};
    for (int r = 0; r < rows; ++r) {
      tile_from[r] = from[r];
      for (int i = r - r % kTileRows; i < r - r % kTileRows + kTileRows; ++i)
        if (from[i] < tile_from[r]) tile_from[r] = from[i];
    }
  }

  void pack_chunk(int64_t token, int n) {
    const int whole = (int)round_up(n, Tiles::kTokens);
    const Kv *keys[kTileTokens], *values[kTileTokens];
    float key_scale[kTileTokens], value_scale[kTileTokens];
    Walk walk(a, it, token);
    for (int j = 0; j < whole; ++j) {
      keys[j] = walk.key();
      values[j] = walk.value();
      key_scale[j] = a.k_scales ? a.k_scales[walk.block * a.kv_heads + it.head] : 1.0f;
      value_scale[j] = a.v_scales ? a.v_scales[walk.block * a.kv_heads + it.head] : 1.0f;
      if (j + 1 < n) walk.next();  // positions after the last token repeat it, and are masked
    }
    for (int j = 0; j < whole; j += W)
      M::pack_keys(k + j / kPanel * kPanel * deep + j % kPanel * M::kStep, keys + j, key_scale + j, (int)a.d, (int)deep,
                   kPanel);
    for (int j = 0; j < whole; j += M::kStep)
      M::pack_values(v + (int64_t)j * kPanel, values + j, value_scale + j, (int)a.d_v, kPanel, kTileTokens * kPanel);
  }

  // Prefetches a few tokens of the next chunk into the second-level cache while this one is computed.
  void look_ahead() {
    const int64_t key_bytes = a.d * (int64_t)sizeof(Kv);
    const int64_t value_bytes = a.values_in_keys() ? 0 : a.d_v * (int64_t)sizeof(Kv);
    for (int i = 0; i < Tiles::kAhead && ahead_left > 0; ++i, --ahead_left) {
      const char *key = (const char*)ahead.key(), *value = (const char*)ahead.value();
      for (int64_t line = 0; line < key_bytes; line += 64) __builtin_prefetch(key + line, 0, 2);
      for (int64_t line = 0; line < value_bytes; line += 64) __builtin_prefetch(value + line, 0, 2);
      if (ahead_left > 1) ahead.next();
    }
  }

  // One panel of keys (from token j of the chunk) or values (from column c) against one tile of rows.
  void score(int r, int j, int64_t token, int n) {
    const int seen = padded(r, token, n);
    if (j >= seen || j + kPanel <= skipped(r, token, n)) return;
    look_ahead();
    Tiles::template product<M, false>(used - r, seen - j, q + r * deep, deep, k + j * deep, (int)deep / M::kStep,
                                      s + place(r) + j, kTileTokens);
  }
  void weigh(int r, int c, int64_t token, int n) {
    const int first = skipped(r, token, n), steps = (padded(r, token, n) - first) / M::kStep;
    look_ahead();
    if (steps > 0)
      Tiles::template product<M, true>(used - r, (int)a.d_v - c, p + place(r) + first, kTileTokens,
                                       v + c * kTileTokens + first * kPanel, steps, acc + r * wide + c, wide);
  }

  // Weights of a query row for the tokens that its tile computes.
  void soften_row(int r, int64_t token, int n) {
    const int first = skipped(r, token, n), count = padded(r, token, n) - first;
    if (count <= 0) return;
    float* scores = s + place(r) + first;
    const Factors factors(a, true, 1);  // keys were scaled when they were packed
    factors.cap(scores, count);
    const int last = visible(r, token, n) - first;
    const Range seen = {clamp(from[r] - token, n) - first, last < 0 ? 0 : last};
    soften<M>(scores, p + place(r) + first, seen, count, factors.outer, 1.0f, acc + r * wide, (int)wide, top[r],
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
