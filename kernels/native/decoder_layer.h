// A decoder layer of Llama's architecture for few rows, without attention: two calls instead of twenty of torch's.
#pragma once
#include "linear.h"

namespace distkv {

constexpr int64_t kElementMultiple = 32;  // of all sizes, so that no vector of a half head is partial

// Operations on one row; sizes are multiples of kElementMultiple. `out` may be an input.
struct Elementwise {
  const char* name;  // of the instruction set that must run here
  void (*norm)(const uint16_t* x, const uint16_t* weight, uint16_t* out, int64_t size, float epsilon);
  void (*sum)(const uint16_t* a, const uint16_t* b, uint16_t* out, int64_t size);
  void (*rotate)(const uint16_t* x, const uint16_t* cosines, const uint16_t* sines, uint16_t* out, int64_t size);
  void (*gated)(const uint16_t* gate, const uint16_t* up, uint16_t* out, int64_t size);
};

extern const Elementwise kElementwisePortable;
#if defined(__x86_64__)
extern const Elementwise kElementwiseAvx512;
#endif

// Python packs it field by field (decoder_layer.py): every field has 8 bytes.
struct DecoderLayer {
  const Linear *query, *key, *value, *output, *gate, *up, *down;
  const uint16_t *norm, *mlp_norm;        // [size]
  const uint16_t *query_norm, *key_norm;  // [head_dim] each, or null
  int64_t size, middle, heads, kv_heads, head_dim;
  int64_t threads;
  double epsilon, mlp_epsilon, head_epsilon;
};

}  // namespace distkv
