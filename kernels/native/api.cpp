// The C interface: checks the values of a call, cuts it into items, runs them, and merges the parts of split rows.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <new>
#include <vector>

#include "core.h"
#include "pool.h"
#include "scratch.h"

namespace distkv {


namespace {

constexpr int64_t kStreamRows = 12;          // up to this many query rows per kv head, KV is streamed in place
// How a row is cut depends on this row alone: threads and other rows must not change how its sums are rounded.
constexpr int64_t kPieceTokens = 1024;       // of a piece, doubled until a row has no more pieces than kPieces
constexpr int64_t kPieces = 32;
constexpr int64_t kTileItems = 32;           // a row with fewer tiles is cut by tokens
constexpr int64_t kTileSplitTokens = 1024;

struct Row {
  int64_t first, last;  // queries
  int64_t length;
  int64_t limit;        // its first query sees tokens <= limit, each next one more
  int64_t step;         // queries of a tile
  int64_t span = 0;     // maximum tokens that a tile reads, counted from the beginning of its first block
  int64_t parts = 1;    // pieces that a tile's tokens are cut into
  int64_t piece = 0;    // tokens of a piece

  int64_t queries() const { return last - first; }
};

// Tokens [first, last) that some queries of a row see.
struct Seen {
  int64_t first, last;
};

struct Plan {
  const Args& a;
  const Served kernels;
  std::vector<Row> rows;
  std::vector<Item> items;
  int64_t streamed = 0;  // the first items are for the streaming kernel
  int64_t partial_floats = 0;
  int64_t scratch_bytes = 0;
  std::atomic<bool> out_of_memory{false};

  int64_t group() const { return a.heads / a.kv_heads; }
  bool streams(const Row& row) const { return row.queries() * group() <= kStreamRows; }

  Status check_and_list_rows();
  Seen seen(const Row& row, int64_t query, int64_t queries) const;
  int64_t begin(const Seen& seen) const { return seen.first / a.block_tokens * a.block_tokens; }
  int64_t piece_tokens(const Row& row) const;
  void split_rows();
  void list_items(float* partials);
  void add_items(const Row& row, int64_t r, int64_t part, float* out, float* lse);
  Item item(const Row& row, int64_t r, int64_t query, int64_t part) const;
  int64_t tile_queries(int64_t queries) const;
  void merge_parts(const float* partials) const;
};

Status Plan::check_and_list_rows() {
  rows.reserve(a.rows);
  int64_t first = 0;
  if (a.offsets && (a.offsets[0] != 0 || a.offsets[a.rows] != a.tokens)) return kBadOffsets;
  for (int64_t r = 0; r < a.rows; ++r) {
    const int64_t length = a.lengths[r], last = a.offsets ? a.offsets[r + 1] : r + 1;
    if (length < 0 || length > a.max_blocks * a.block_tokens) return kBadLengths;
    if (last < first || last > a.tokens) return kBadOffsets;
    const int32_t* table = a.tables + r * a.table_stride;
    uint32_t worst = 0;  // as unsigned, a negative id is a huge one
    for (int64_t b = 0; b * a.block_tokens < length; ++b) worst = std::max(worst, static_cast<uint32_t>(table[b]));
    if (length > 0 && worst >= a.blocks) return kBadTables;
    rows.push_back({first, last, length, a.starts ? a.starts[r] : kNoLimit, tile_queries(last - first)});
    first = last;
  }
  return kOk;
}

// Few queries are one tile, more are cut into equal ones.
int64_t Plan::tile_queries(int64_t queries) const {
  if (queries * group() <= kStreamRows) return std::max<int64_t>(1, queries);
  const int64_t most = std::max<int64_t>(1, kernels.many->tile_rows / group());
  const int64_t tiles = (queries + most - 1) / most;
  return (queries + tiles - 1) / tiles;
}

// Nothing of a row is read before the first token that one of the queries sees, or after the last.
Seen Plan::seen(const Row& row, int64_t query, int64_t queries) const {
  const auto end = [&](int64_t i) { return std::max<int64_t>(0, std::min(row.length, row.limit + i + 1)); };
  if (!a.first_keys) return {0, end(query + queries - 1)};
  Seen all{row.length, 0};
  for (int64_t i = query; i < query + queries; ++i) {
    const int64_t first = std::max(0, a.first_keys[row.first + i]);
    if (first < end(i)) all = {std::min(all.first, first), end(i)};
  }
  return all.first < all.last ? all : Seen{0, 0};
}

int64_t Plan::piece_tokens(const Row& row) const {
  if (streams(row)) {
    int64_t tokens = kPieceTokens;
    while (tokens * kPieces < row.span) tokens *= 2;
    return tokens;
  }
  const int64_t tiles = (row.queries() + row.step - 1) / row.step * a.kv_heads;
  const int64_t parts = std::min((kTileItems + tiles - 1) / tiles, row.span / kTileSplitTokens);
  return parts > 1 ? (row.span + parts - 1) / parts : row.span;
}

void Plan::split_rows() {
  for (Row& row : rows) {
    if (row.queries() == 0) continue;
    for (int64_t q = 0; q < row.queries(); q += row.step) {
      const Seen tile = seen(row, q, std::min(row.step, row.queries() - q));
      row.span = std::max(row.span, tile.last - begin(tile));
    }
    row.piece = std::max<int64_t>(1, (piece_tokens(row) + a.block_tokens - 1) / a.block_tokens) * a.block_tokens;
    row.parts = std::max<int64_t>(1, (row.span + row.piece - 1) / row.piece);
    partial_floats += (row.parts - 1) * row.queries() * a.heads * (a.d_v + 1);
  }
}

// A piece of the tile that begins with a row's query.
Item Plan::item(const Row& row, int64_t r, int64_t query, int64_t part) const {
  Item it{};
  it.table = a.tables + r * a.table_stride;
  it.query = row.first + query;
  it.queries = std::min(row.step, row.queries() - query);
  it.heads = a.kv_heads;
  const Seen tile = seen(row, query, it.queries);
  const int64_t first = begin(tile) + part * row.piece;
  it.first = std::max(tile.first, first);
  it.last = std::min(tile.last, first + row.piece);
  it.limit = row.limit + query;
  it.first_keys = a.first_keys ? a.first_keys + it.query : nullptr;
  return it;
}

void Plan::add_items(const Row& row, int64_t r, int64_t part, float* out, float* lse) {
  const bool whole = streams(row);
  scratch_bytes = std::max(scratch_bytes, whole ? kernels.few->stream_bytes(a, row.step) : kernels.many->tile_bytes(a, row.step));
  for (int64_t q = (row.queries() - 1) / row.step * row.step; q >= 0; q -= row.step) {  // the longest first
    Item it = item(row, r, q, part);
    it.out = out + q * a.heads * a.d_v;
    it.lse = lse + q * a.heads;
    if (!whole) it.heads = 1;
    for (it.head = 0; it.head < a.kv_heads; it.head += it.heads) items.push_back(it);
  }
}

void Plan::list_items(float* partials) {
  for (const bool stream : {true, false}) {
    float* spare = partials;
    for (int64_t r = 0; r < a.rows; ++r) {
      const Row& row = rows[r];
      const int64_t floats = row.queries() * a.heads * a.d_v;
      for (int64_t part = 0; part < row.parts; ++part) {
        float* out = part ? spare : a.out + row.first * a.heads * a.d_v;
        float* lse = part ? spare + floats : a.lse + row.first * a.heads;
        if (part) spare += floats + row.queries() * a.heads;
        if (row.queries() > 0 && stream == streams(row)) add_items(row, r, part, out, lse);
      }
    }
    if (stream) streamed = static_cast<int64_t>(items.size());
  }
}

void Plan::merge_parts(const float* partials) const {
  for (const Row& row : rows) {
    const int64_t lses = row.queries() * a.heads, floats = lses * a.d_v;
    for (int64_t part = 1; part < row.parts; ++part, partials += floats + lses)
      kernels.few->merge(a.out + row.first * a.heads * a.d_v, a.lse + row.first * a.heads, partials, partials + floats,
                         lses, a.d_v);
  }
}

void work(void* context, int64_t index) {
  thread_local Scratch scratch;
  Plan& plan = *static_cast<Plan*>(context);
  char* memory = scratch.reserve(plan.scratch_bytes);
  if (!memory) {
    plan.out_of_memory = true;
    return;
  }
  (index < plan.streamed ? plan.kernels.few->stream : plan.kernels.many->tile)(plan.a, plan.items[index], memory);
}

Status attend(const Args& a, Served kernels) {
  thread_local Scratch scratch;
  Plan plan{a, kernels};
  const Status status = plan.check_and_list_rows();
  if (status != kOk) return status;
  plan.split_rows();
  float* partials = nullptr;
  if (plan.partial_floats) {
    partials = reinterpret_cast<float*>(scratch.reserve(plan.partial_floats * static_cast<int64_t>(sizeof(float))));
    if (!partials) return kNoMemory;
  }
  plan.list_items(partials);
  run_items(work, &plan, static_cast<int64_t>(plan.items.size()), a.threads);
  if (plan.out_of_memory) return kNoMemory;
  plan.merge_parts(partials);
  return kOk;
}

}  // namespace
}  // namespace distkv

// Returns a distkv::Status. `isa` is empty for the default kernels (choose.cpp).
DISTKV_EXPORT int distkv_attend(const distkv::Args* args, const char* isa) {
  try {
    const distkv::Kernels* one = *isa ? distkv::find(isa) : nullptr;
    return distkv::attend(*args, one ? distkv::served_by(one, args->kv_dtype) : distkv::served(args->kv_dtype));
  } catch (const std::bad_alloc&) {
    return distkv::kNoMemory;
  }
}

// out [tokens, heads, d], lse [tokens, heads] merged with a partial of `count` tokens that go to tokens index[i], or to
// the same ones without an index. Returns 0, or 1 if an index is out of range or given twice (nothing is changed).
DISTKV_EXPORT int distkv_merge(float* out, float* lse, const float* part_out, const float* part_lse,
                               const int64_t* index, int64_t count, int64_t tokens, int64_t heads, int64_t d) {
  const distkv::Kernels* kernels = distkv::served(distkv::kFp32).few;
  if (!index) {
    kernels->merge(out, lse, part_out, part_lse, count * heads, d);
    return 0;
  }
  try {
    std::vector<bool> given(tokens);
    for (int64_t i = 0; i < count; ++i) {
      if (index[i] < 0 || index[i] >= tokens || given[index[i]]) return 1;
      given[index[i]] = true;
    }
  } catch (const std::bad_alloc&) {
    return 1;
  }
  for (int64_t i = 0; i < count; ++i)
    kernels->merge(out + index[i] * heads * d, lse + index[i] * heads, part_out + i * heads * d, part_lse + i * heads,
                   heads, d);
  return 0;
}
