// The plain C interface: checks the values of a call, cuts it into items, runs them, merges the parts of split rows.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "core.h"
#include "pool.h"

namespace distkv {

static bool is_amd_zen5() {
#if defined(__x86_64__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid(0, &a, &b, &c, &d) || c != signature_AMD_ecx) return false;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return false;
  return ((a >> 8) & 15) + ((a >> 20) & 255) == 0x1a;  // family
#else
  return false;
#endif
}
const bool kAskIntoFirstLevel = is_amd_zen5();

namespace {

constexpr int64_t kStreamRows = 12;          // up to so many query rows per kv head, KV is streamed in place
constexpr int64_t kTileRowsWanted = 192;     // query rows of a tile
// How a row is cut depends on this row alone: neither threads nor other rows may change how its sums are rounded.
constexpr int64_t kPieceTokens = 1024;       // of a piece, doubled until a row has no more pieces than kPieces
constexpr int64_t kPieces = 32;
constexpr int64_t kTileItems = 32;           // a row with fewer tiles is cut by tokens
constexpr int64_t kTileSplitTokens = 1024;

const Kernels* const kAll[] = {
#if defined(__x86_64__)
    &kAvx512Bf16, &kAvx512, &kAvx2,
#endif
    &kPortable};

bool supported(const Kernels* kernels) {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (kernels == &kAvx2) return avx2;
  if (kernels == &kAvx512) return avx512;
  if (kernels == &kAvx512Bf16) return avx512 && __builtin_cpu_supports("avx512bf16");
#endif
  return kernels == &kPortable;
}

const Kernels* find(const char* name) {
  for (const Kernels* kernels : kAll)
    if (supported(kernels) && (!*name || !std::strcmp(name, kernels->name))) return kernels;
  return nullptr;
}

// Memory of one thread that grows and is kept: kernels are called once per layer.
class Scratch {
 public:
  ~Scratch() { std::free(data_); }
  char* reserve(int64_t bytes) {
    if (bytes > size_) {
      std::free(data_);
      size_ = (bytes + 4095) / 4096 * 4096;
      data_ = static_cast<char*>(std::aligned_alloc(64, size_));
      if (!data_) size_ = 0;
    }
    return data_;
  }

 private:
  char* data_ = nullptr;
  int64_t size_ = 0;
};

struct Row {
  int64_t first, last;  // queries
  int64_t seen;         // tokens that its last query sees
  int64_t parts;        // pieces that its tokens are cut into
  int64_t piece;        // tokens of a piece
};

struct Plan {
  const Args& a;
  const Kernels& kernels;
  std::vector<Row> rows;
  std::vector<Item> items;
  int64_t streamed = 0;  // the first items are for the streaming kernel
  int64_t partial_floats = 0;
  int64_t scratch_bytes = 0;
  std::atomic<bool> out_of_memory{false};

  int64_t group() const { return a.heads / a.kv_heads; }
  bool streams(const Row& row) const { return (row.last - row.first) * group() <= kStreamRows; }
  int64_t token_bytes() const {
    const int64_t size = a.kv_dtype == kFp32 ? 4 : a.kv_dtype == kInt8 ? 1 : 2;
    return 2 * a.kv_heads * a.d * size;
  }

  Status check_and_list_rows();
  int64_t piece_tokens(const Row& row) const;
  void split_rows();
  void list_items(float* partials);
  void add_stream_item(const Row& row, int64_t r, int64_t part, float* out, float* lse);
  void add_tile_items(const Row& row, int64_t r, int64_t part, float* out, float* lse);
  Item item(const Row& row, int64_t r, int64_t part, float* out, float* lse) const;
  int64_t tile_queries(const Row& row) const;
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
    const int64_t limit = a.starts ? int64_t{a.starts[r]} + (last - first) : length;
    rows.push_back({first, last, first < last ? std::max<int64_t>(0, std::min(length, limit)) : 0, 1, 0});
    first = last;
  }
  return kOk;
}

int64_t Plan::tile_queries(const Row& row) const {
  const int64_t queries = row.last - row.first, most = std::max<int64_t>(1, kTileRowsWanted / group());
  const int64_t tiles = (queries + most - 1) / most;
  return (queries + tiles - 1) / tiles;
}

int64_t Plan::piece_tokens(const Row& row) const {
  const int64_t queries = row.last - row.first;
  if (queries == 0) return row.seen;
  if (streams(row)) {
    int64_t tokens = kPieceTokens;
    while (tokens * kPieces < row.seen) tokens *= 2;
    return tokens;
  }
  const int64_t tiles = (queries + tile_queries(row) - 1) / tile_queries(row) * a.kv_heads;
  const int64_t parts = std::min((kTileItems + tiles - 1) / tiles, row.seen / kTileSplitTokens);
  return parts > 1 ? (row.seen + parts - 1) / parts : row.seen;
}

void Plan::split_rows() {
  for (Row& row : rows) {
    row.piece = std::max<int64_t>(1, (piece_tokens(row) + a.block_tokens - 1) / a.block_tokens) * a.block_tokens;
    row.parts = std::max<int64_t>(1, (row.seen + row.piece - 1) / row.piece);
    partial_floats += (row.parts - 1) * (row.last - row.first) * a.heads * (a.d + 1);
  }
}

Item Plan::item(const Row& row, int64_t r, int64_t part, float* out, float* lse) const {
  Item it{};
  it.table = a.tables + r * a.table_stride;
  it.query = row.first;
  it.queries = row.last - row.first;
  it.heads = a.kv_heads;
  it.first = part * row.piece;
  it.last = std::min(row.seen, it.first + row.piece);
  it.limit = a.starts ? a.starts[r] : kNoLimit;
  it.out = out;
  it.lse = lse;
  return it;
}

void Plan::add_stream_item(const Row& row, int64_t r, int64_t part, float* out, float* lse) {
  items.push_back(item(row, r, part, out, lse));
  scratch_bytes = std::max(scratch_bytes, kernels.stream_bytes(a, row.last - row.first));
}

void Plan::add_tile_items(const Row& row, int64_t r, int64_t part, float* out, float* lse) {
  const int64_t step = tile_queries(row);
  scratch_bytes = std::max(scratch_bytes, kernels.tile_bytes(a, step));
  for (int64_t q = (row.last - row.first - 1) / step * step; q >= 0; q -= step)  // the longest first
    for (int64_t h = 0; h < a.kv_heads; ++h) {
      Item it = item(row, r, part, out + q * a.heads * a.d, lse + q * a.heads);
      it.query += q;
      it.queries = std::min(step, row.last - row.first - q);
      it.limit += q;
      it.last = std::min(it.last, it.limit + it.queries);
      it.head = h;
      it.heads = 1;
      items.push_back(it);
    }
}

void Plan::list_items(float* partials) {
  for (const bool stream : {true, false}) {
    float* spare = partials;
    for (int64_t r = 0; r < a.rows; ++r) {
      const Row& row = rows[r];
      const int64_t queries = row.last - row.first, floats = queries * a.heads * a.d;
      for (int64_t part = 0; part < row.parts; ++part) {
        float* out = part ? spare : a.out + row.first * a.heads * a.d;
        float* lse = part ? spare + floats : a.lse + row.first * a.heads;
        if (part) spare += floats + queries * a.heads;
        if (queries == 0 || stream != streams(row)) continue;
        if (stream) add_stream_item(row, r, part, out, lse);
        else add_tile_items(row, r, part, out, lse);
      }
    }
    if (stream) streamed = static_cast<int64_t>(items.size());
  }
}

void Plan::merge_parts(const float* partials) const {
  for (const Row& row : rows) {
    const int64_t queries = row.last - row.first, floats = queries * a.heads * a.d;
    for (int64_t part = 1; part < row.parts; ++part) {
      kernels.merge(a.out + row.first * a.heads * a.d, a.lse + row.first * a.heads, partials, partials + floats,
                    queries * a.heads, a.d);
      partials += floats + queries * a.heads;
    }
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
  (index < plan.streamed ? plan.kernels.stream : plan.kernels.tile)(plan.a, plan.items[index], memory);
}

Status attend(const Args& a, const Kernels& kernels) {
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

// Name of the best instruction set that is compiled in and that this processor has.
DISTKV_EXPORT const char* distkv_isa() { return distkv::find("")->name; }

// Whether an instruction set, by name, can be used here.
DISTKV_EXPORT int distkv_has_isa(const char* name) { return *name && distkv::find(name) != nullptr; }

// Returns a distkv::Status. `isa` is empty for the best one.
DISTKV_EXPORT int distkv_attend(const distkv::Args* args, const char* isa) {
  try {
    return distkv::attend(*args, *distkv::find(isa));
  } catch (const std::bad_alloc&) {
    return distkv::kNoMemory;
  }
}

// out [tokens, heads, d], lse [tokens, heads] merged with a partial of `count` tokens that go to tokens index[i], or to
// the same ones without an index. Returns 0, or 1 where an index is out of range or given twice (nothing is changed).
DISTKV_EXPORT int distkv_merge(float* out, float* lse, const float* part_out, const float* part_lse,
                               const int64_t* index, int64_t count, int64_t tokens, int64_t heads, int64_t d) {
  const distkv::Kernels* kernels = distkv::find("");
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
