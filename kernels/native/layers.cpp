// One layer of a batch that stays the same from layer to layer: new KV goes into the pool, then the queries attend.
#include <cstring>

#include "core.h"

extern "C" int distkv_attend(const distkv::Args* args, const char* isa);

namespace distkv {

// Python packs it field by field (native_kernel.py): every field has 8 bytes.
struct Layers {
  Args args;                // q, k, v and scale come with each call
  const void* const* k;     // [layers] keys and values of the layers' pools
  const void* const* v;
  int64_t layers;
  const int64_t* blocks;    // [appended] where new tokens go: block ids and offsets within them
  const int64_t* offsets;
  int64_t appended;
};

namespace {

bool slots_fit(const Layers& batch) {
  for (int64_t i = 0; i < batch.appended; ++i)
    if (batch.blocks[i] < 0 || batch.blocks[i] >= batch.args.blocks || batch.offsets[i] < 0 ||
        batch.offsets[i] >= batch.args.block_tokens)
      return false;
  return true;
}

// fresh [appended, kv_heads, d] into pool [blocks, kv_heads, block_tokens, d]
void append(const Layers& batch, const void* pool, int64_t block_stride, const void* fresh) {
  const Args& a = batch.args;
  const int64_t bytes = a.d * (a.kv_dtype == kFp32 ? 4 : a.kv_dtype == kInt8 ? 1 : 2), size = bytes / a.d;
  const char* from = static_cast<const char*>(fresh);
  for (int64_t i = 0; i < batch.appended; ++i) {
    char* to = static_cast<char*>(const_cast<void*>(pool)) + batch.blocks[i] * block_stride * size +
               batch.offsets[i] * bytes;
    for (int64_t h = 0; h < a.kv_heads; ++h, from += bytes, to += a.block_tokens * bytes) std::memcpy(to, from, bytes);
  }
}

}  // namespace
}  // namespace distkv

// Appends k, v [appended, kv_heads, d] to a layer and attends with q. Returns a distkv::Status.
DISTKV_EXPORT int distkv_layer(const distkv::Layers* batch, const void* q, const void* k, const void* v, int64_t layer,
                               double scale) {
  if (layer < 0 || layer >= batch->layers || !distkv::slots_fit(*batch)) return distkv::kBadSlots;
  distkv::Args args = batch->args;
  args.q = q;
  args.k = batch->k[layer];
  args.v = batch->v[layer];
  args.scale = scale;
  distkv::append(*batch, args.k, args.k_block, k);
  distkv::append(*batch, args.v, args.v_block, v);
  return distkv_attend(&args, "");
}

#define AT(field) DISTKV_AT(distkv::Args, field)
DISTKV_LAYOUT(args, distkv::Args,
              AT(q), AT(k), AT(v), AT(tables), AT(lengths), AT(offsets), AT(starts), AT(k_scales), AT(v_scales),
              AT(out), AT(lse), AT(rows), AT(tokens), AT(heads), AT(kv_heads), AT(d), AT(block_tokens), AT(blocks),
              AT(max_blocks), AT(table_stride), AT(k_block), AT(v_block), AT(q_dtype), AT(kv_dtype), AT(threads),
              AT(scale))
#undef AT

#define AT(field) DISTKV_AT(distkv::Layers, field)
DISTKV_LAYOUT(layers, distkv::Layers,
              AT(args), AT(k), AT(v), AT(layers), AT(blocks), AT(offsets), AT(appended))
#undef AT
