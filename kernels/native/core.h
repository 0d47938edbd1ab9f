// The pieces that the planner (api.cpp) and the per-processor kernels (isa_*.cpp) share. Lengths and strides count
// elements, not bytes. The isa files are compiled for one instruction set each and must not include C++ library
// templates: the linker could keep their copy of a shared inline function for processors that cannot run it.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "exports.h"

// Loops over vectors held in registers must be unrolled: an array that is indexed at run time is in memory.
#define DISTKV_UNROLL _Pragma("GCC unroll 16")

namespace distkv {

enum Dtype : int64_t { kBf16 = 0, kFp16 = 1, kFp32 = 2, kInt8 = 3, kDtypes = 4 };
enum Status : int { kOk = 0, kBadLengths = 1, kBadOffsets = 2, kBadTables = 3, kNoMemory = 4, kBadSlots = 5 };

// One call of micro_attention. Python packs it field by field (native_kernel.py): every field has 8 bytes.
struct Args {
  const void* q;
  const void* k;
  const void* v;
  const int32_t* tables;
  const int32_t* lengths;
  const int32_t* offsets;  // null: one query per row
  const int32_t* starts;   // null: full attention
  const int32_t* first_keys;  // [tokens] first token that each query sees; null: all from the row's first
  const float* k_scales;   // null unless int8
  const float* v_scales;
  float* out;
  float* lse;
  int64_t rows, tokens, heads, kv_heads, d, block_tokens, blocks, max_blocks, table_stride;
  int64_t k_block, v_block;  // stride between blocks
  int64_t d_v, v_token;      // numbers of a value, and stride between the values of two tokens: d_v or d
  int64_t q_dtype, kv_dtype;
  int64_t threads;
  double soft_cap;  // 0: none
  double scale;

  // Whether values are the first numbers of the keys: then they are prefetched and stored once.
  bool values_in_keys() const { return k == v && k_block == v_block && v_token == d; }
};

// A piece of work: some queries of one row over a range of its tokens.
struct Item {
  const int32_t* table;    // of the row
  int64_t query, queries;  // first query in q, and how many
  int64_t head, heads;     // kv heads
  int64_t first, last;     // tokens [first, last)
  int64_t limit;           // the first query sees tokens <= limit, each next one more
  const int32_t* first_keys;  // each query sees tokens >= first_keys[i]; null: all
  float* out;              // of the first query, [queries, heads, d_v]
  float* lse;
};

// Kernels for one instruction set. `scratch` has the size that the matching *_bytes function returned, 64-byte aligned.
struct Kernels {
  const char* name;
  const Kernels* base;  // for all but many queries over bf16; null: these kernels take everything
  int64_t (*stream_bytes)(const Args&, int64_t queries);
  void (*stream)(const Args&, const Item&, char* scratch);  // few queries: KV is streamed from memory once
  int64_t tile_rows;                                        // query rows (queries times group) of a tile at most
  int64_t (*tile_bytes)(const Args&, int64_t queries);
  void (*tile)(const Args&, const Item&, char* scratch);    // many queries: KV is packed for a matrix product
  void (*merge)(float* out, float* lse, const float* part_out, const float* part_lse, int64_t rows, int64_t d);
};

extern const Kernels kPortable, kAmxModel;
#if defined(__x86_64__)
extern const Kernels kAvx2, kAvx512, kAvx512Bf16, kAmxBf16, kAmxModelAvx512;
#elif defined(__aarch64__)
extern const Kernels kNeon, kNeonBf16;
#endif

// The kernels of an instruction set, by name (empty: the first that runs here); null: none of that name runs here.
const Kernels* find(const char* name);

// The kernels of a call: for few queries, and for many.
struct Served {
  const Kernels* few;
  const Kernels* many;
};
Served served(int64_t kv_dtype);                           // if a call names no instruction set
Served served_by(const Kernels* kernels, int64_t kv_dtype);  // if it names this one

// Whether decode prefetches into the first-level cache or the second. Zen 5 reads faster with the first (28
// instead of 22 GB/s on one thread), Zen 4 with the second (24 instead of 15). Unknown processors get the second.
extern const bool kAskIntoFirstLevel;

static inline int clamp(int64_t x, int high) { return x < 0 ? 0 : x < high ? static_cast<int>(x) : high; }

constexpr int64_t kNoLimit = INT64_MAX / 4;
constexpr float kLog2E = 1.44269504088896340736f;
constexpr float kLn2 = 0.69314718055994530942f;

}  // namespace distkv
