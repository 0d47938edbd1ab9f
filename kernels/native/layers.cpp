// One layer of a batch that is the same in all layers: new KV is stored in the pool, then the queries attend.
//
// Layers may be of several kinds, for instance with and without a window: each kind has its own arguments.
#include <cstring>

#include "core.h"

extern "C" int distkv_attend(const distkv::Args* args, const char* isa);

namespace distkv {

// Python packs it field by field (native_kernel.py): every field has 8 bytes.
struct Layers {
  const Args* const* args;  // [layers] of the layer's kind; q, k, v and scale come with each call
  const void* const* k;     // [layers] keys and values of the layers' pools
  const void* const* v;
  int64_t layers;
  const int64_t* blocks;    // [appended] slots of new tokens: block ids and offsets within them
  const int64_t* offsets;
  int64_t appended;
};

namespace {

bool slots_fit(const Layers& batch, const Args& a) {
  for (int64_t i = 0; i < batch.appended; ++i)
    if (batch.blocks[i] < 0 || batch.blocks[i] >= a.blocks || batch.offsets[i] < 0 || batch.offsets[i] >= a.block_tokens)
      return false;
  return true;
}

// A pool [blocks, kv_heads, block_tokens, d], tokens of a head `token` elements apart.
struct Room {
  const void* pool;
  int64_t block, token, d;
};

// Stores fresh [appended, kv_heads, d] in a pool.
void append(const Layers& batch, const Args& a, const Room& room, const void* fresh) {
  const int64_t size = a.kv_dtype == kFp32 ? 4 : a.kv_dtype == kInt8 ? 1 : 2, bytes = room.d * size;
  const char* from = static_cast<const char*>(fresh);
  for (int64_t i = 0; i < batch.appended; ++i) {
    char* to = static_cast<char*>(const_cast<void*>(room.pool)) +
               (batch.blocks[i] * room.block + batch.offsets[i] * room.token) * size;
    for (int64_t h = 0; h < a.kv_heads; ++h, from += bytes, to += a.block_tokens * room.token * size)
      std::memcpy(to, from, bytes);
  }
}

}  // namespace
}  // namespace distkv

// Appends k, v [appended, kv_heads, d] to a layer and attends with q; where values are the first numbers of keys, v is not
// read. Returns a distkv::Status.
DISTKV_EXPORT int distkv_layer(const distkv::Layers* batch, const void* q, const void* k, const void* v, int64_t layer,
                               double scale) {
  if (layer < 0 || layer >= batch->layers) return distkv::kBadSlots;
  distkv::Args args = *batch->args[layer];
  if (!distkv::slots_fit(*batch, args)) return distkv::kBadSlots;
  args.q = q;
  args.k = batch->k[layer];
  args.v = batch->v[layer];
  args.scale = scale;
  distkv::append(*batch, args, {args.k, args.k_block, args.d, args.d}, k);
  if (!args.values_in_keys()) distkv::append(*batch, args, {args.v, args.v_block, args.v_token, args.d_v}, v);
  return distkv_attend(&args, "");
}

#define AT(field) DISTKV_AT(distkv::Args, field)
DISTKV_LAYOUT(args, distkv::Args,
              AT(q), AT(k), AT(v), AT(tables), AT(lengths), AT(offsets), AT(starts), AT(first_keys), AT(k_scales),
              AT(v_scales), AT(out), AT(lse), AT(rows), AT(tokens), AT(heads), AT(kv_heads), AT(d), AT(block_tokens), AT(blocks),
              AT(max_blocks), AT(table_stride), AT(k_block), AT(v_block), AT(d_v), AT(v_token), AT(q_dtype),
              AT(kv_dtype), AT(threads), AT(soft_cap), AT(scale))
#undef AT

#define AT(field) DISTKV_AT(distkv::Layers, field)
DISTKV_LAYOUT(layers, distkv::Layers,
              AT(args), AT(k), AT(v), AT(layers), AT(blocks), AT(offsets), AT(appended))
#undef AT
