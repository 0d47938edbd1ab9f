// The plain C interface of decoder_layer.h.
#include "decoder_layer.h"

#include <utility>

#include "pool.h"
#include "scratch.h"

namespace distkv {
namespace {

constexpr int64_t kRowsOfItem = 16;  // rows of an item, because one row is too little work

// Calls work(row) for all rows, on several threads if there are many.
template <class Work>
void for_rows(int64_t count, int64_t threads, const Work& work) {
  struct Rows {
    const Work& work;
    int64_t count;
  } rows{work, count};
  const auto some = [](void* context, int64_t item) {
    const Rows& all = *static_cast<Rows*>(context);
    const int64_t first = item * kRowsOfItem, last = first + kRowsOfItem;
    for (int64_t row = first; row < last && row < all.count; ++row) all.work(row);
  };
  run_items(some, &rows, (count + kRowsOfItem - 1) / kRowsOfItem, threads);
}

// The fastest operations that run here; the portable ones if products are in software.
const Elementwise& elementwise(const LinearKernels& kernels) {
#if defined(__x86_64__)
  static const bool fast = find(kElementwiseAvx512.name) != nullptr;
  if (fast && &kernels != &kLinearAmxModel) return kElementwiseAvx512;
#endif
  return kElementwisePortable;
}

struct Memory {
  uint16_t* parts[4];
};

// Buffers of [count, sizes[i]], of this thread.
bool reserve(Memory& memory, int64_t count, const int64_t (&sizes)[4]) {
  thread_local Scratch scratch;
  int64_t all = 0;
  for (const int64_t size : sizes) all += size;
  auto* at = reinterpret_cast<uint16_t*>(scratch.reserve(all * count * static_cast<int64_t>(sizeof(uint16_t))));
  if (!at) return false;
  for (int i = 0; i < 4; ++i) memory.parts[i] = at, at += count * sizes[i];
  return true;
}

// Products of rows [count, inputs] with one or more linears.
template <size_t... At>
bool products(std::index_sequence<At...>, const DecoderLayer& layer, const LinearKernels& kernels,
              const Linear* const* linears, const uint16_t* rows, int64_t count, uint16_t* const* outs) {
  LinearCall first{*linears[0], rows, nullptr, count, linears[0]->inputs, outs[0]};
  if (!prepare(first, kernels)) return false;
  const LinearCall calls[] = {{*linears[At], first.rows, first.wide, count, first.stride, outs[At]}...};
  multiply(calls, sizeof...(At), kernels, layer.threads);
  return true;
}

template <size_t Count>
bool products(const DecoderLayer& layer, const LinearKernels& kernels, const Linear* const (&linears)[Count],
              const uint16_t* rows, int64_t count, uint16_t* const (&outs)[Count]) {
  return products(std::make_index_sequence<Count>{}, layer, kernels, linears, rows, count, outs);
}

// Norms of heads, if any, and rotary embeddings.
void turn(const DecoderLayer& layer, const Elementwise& by, const uint16_t* norm, int64_t heads, const uint16_t* cosines,
          const uint16_t* sines, uint16_t* row) {
  for (int64_t head = 0; head < heads; ++head, row += layer.head_dim) {
    if (norm) by.norm(row, norm, row, layer.head_dim, static_cast<float>(layer.head_epsilon));
    by.rotate(row, cosines, sines, row, layer.head_dim);
  }
}

}  // namespace
}  // namespace distkv

// Queries, keys and values [count, heads, head_dim] of hidden states [count, size], at positions with these cosines and
// sines [count, head_dim]. Returns a distkv::Status, as the next one does.
DISTKV_EXPORT int distkv_before_attention(const distkv::DecoderLayer* of, const void* kernels, const uint16_t* hidden,
                                          int64_t count, const uint16_t* cosines, const uint16_t* sines, uint16_t* query,
                                          uint16_t* key, uint16_t* value) {
  using namespace distkv;
  const DecoderLayer& layer = *of;
  const auto& chosen = *static_cast<const LinearKernels*>(kernels);
  const Elementwise& row_by_row = elementwise(chosen);
  Memory memory;
  if (!reserve(memory, count, {layer.size, 0, 0, 0})) return kNoMemory;
  uint16_t* const normed = memory.parts[0];
  const auto epsilon = static_cast<float>(layer.epsilon);
  for_rows(count, layer.threads, [&](int64_t row) {
    row_by_row.norm(hidden + row * layer.size, layer.norm, normed + row * layer.size, layer.size, epsilon);
  });
  if (!products(layer, chosen, {layer.query, layer.key, layer.value}, normed, count, {query, key, value}))
    return kNoMemory;
  for_rows(count, layer.threads, [&](int64_t row) {
    const int64_t d = layer.head_dim;
    const uint16_t *turns = cosines + row * d, *others = sines + row * d;
    turn(layer, row_by_row, layer.query_norm, layer.heads, turns, others, query + row * layer.heads * d);
    turn(layer, row_by_row, layer.key_norm, layer.kv_heads, turns, others, key + row * layer.kv_heads * d);
  });
  return kOk;
}

// Hidden states after the layer, from those before it and attention's result [count, heads * head_dim].
DISTKV_EXPORT int distkv_after_attention(const distkv::DecoderLayer* of, const void* kernels, const uint16_t* hidden,
                                         int64_t count, const uint16_t* attended, uint16_t* out) {
  using namespace distkv;
  const DecoderLayer& layer = *of;
  const auto& chosen = *static_cast<const LinearKernels*>(kernels);
  const Elementwise& row_by_row = elementwise(chosen);
  Memory memory;
  if (!reserve(memory, count, {layer.size, layer.size, layer.middle, layer.middle})) return kNoMemory;
  const auto [added, normed, gate, up] = memory.parts;
  if (!products(layer, chosen, {layer.output}, attended, count, {added})) return kNoMemory;
  const auto epsilon = static_cast<float>(layer.mlp_epsilon);
  for_rows(count, layer.threads, [&, added = added, normed = normed](int64_t row) {
    const int64_t at = row * layer.size;
    row_by_row.sum(hidden + at, added + at, added + at, layer.size);
    row_by_row.norm(added + at, layer.mlp_norm, normed + at, layer.size, epsilon);
  });
  if (!products(layer, chosen, {layer.gate, layer.up}, normed, count, {gate, up})) return kNoMemory;
  for_rows(count, layer.threads, [&, gate = gate, up = up](int64_t row) {
    const int64_t at = row * layer.middle;
    row_by_row.gated(gate + at, up + at, gate + at, layer.middle);
  });
  if (!products(layer, chosen, {layer.down}, gate, count, {normed})) return kNoMemory;
  for_rows(count, layer.threads, [&, added = added, normed = normed](int64_t row) {
    const int64_t at = row * layer.size;
    row_by_row.sum(added + at, normed + at, out + at, layer.size);
  });
  return kOk;
}
DISTKV_LAYOUT(decoder_layer, distkv::DecoderLayer, DISTKV_AT(distkv::DecoderLayer, query),
              DISTKV_AT(distkv::DecoderLayer, key), DISTKV_AT(distkv::DecoderLayer, value),
              DISTKV_AT(distkv::DecoderLayer, output), DISTKV_AT(distkv::DecoderLayer, gate),
              DISTKV_AT(distkv::DecoderLayer, up), DISTKV_AT(distkv::DecoderLayer, down),
              DISTKV_AT(distkv::DecoderLayer, norm), DISTKV_AT(distkv::DecoderLayer, mlp_norm),
              DISTKV_AT(distkv::DecoderLayer, query_norm), DISTKV_AT(distkv::DecoderLayer, key_norm),
              DISTKV_AT(distkv::DecoderLayer, size), DISTKV_AT(distkv::DecoderLayer, middle),
              DISTKV_AT(distkv::DecoderLayer, heads), DISTKV_AT(distkv::DecoderLayer, kv_heads),
              DISTKV_AT(distkv::DecoderLayer, head_dim), DISTKV_AT(distkv::DecoderLayer, threads),
              DISTKV_AT(distkv::DecoderLayer, epsilon), DISTKV_AT(distkv::DecoderLayer, mlp_epsilon),
              DISTKV_AT(distkv::DecoderLayer, head_epsilon))
