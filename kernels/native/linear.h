// Products of a linear's bf16 weights with few rows, as in decoding: the weights are read from memory once, in order.
//
// Weights lie in panels of 32 outputs: [outputs / 32, pairs, 32, 2], both padded with zeros to 32 inputs and outputs.
// Products are summed in fp32, the bias is added, and the sum is rounded to bf16 once.
#pragma once
#include "core.h"

namespace distkv {

constexpr int kPanelOutputs = 32, kPanelInputs = 32;
constexpr int kRowBlock = 16;                // rows are padded to a multiple of this
constexpr int64_t kPrefetchAhead = 8 << 10;  // bytes

// Python packs it field by field (few_rows.py): every field has 8 bytes.
struct Linear {
  const uint16_t* weight;  // packed
  const float* bias;       // [outputs], or null
  int64_t inputs, outputs;
  int64_t threads;
};

// A call: rows [padded to kRowBlock, padded to kPanelInputs] that lie `stride` elements apart.
struct LinearCall {
  const Linear& linear;
  const uint16_t* rows;
  const float* wide;  // the same in fp32 if the kernels need it, without padded rows
  int64_t count, stride;
  uint16_t* out;      // [count, outputs]

  int64_t pairs() const { return (linear.inputs + kPanelInputs - 1) / kPanelInputs * (kPanelInputs / 2); }
};

struct LinearKernels {
  const char* name;  // of the instruction set that must run here
  bool wide;         // whether they need rows in fp32
  void (*panels)(const LinearCall&, int64_t first, int64_t last);
};

// Prepares rows for the kernels: padded with zeros, and in fp32 if needed, in memory of this thread until it prepares
// others. Returns false if there is no memory.
bool prepare(LinearCall& call, const LinearKernels& kernels);

// Products of prepared rows with several linears, whose panels are divided among threads together.
void multiply(const LinearCall* calls, int count, const LinearKernels& kernels, int64_t threads);

extern const LinearKernels kLinearAmxModel;
#if defined(__x86_64__)
extern const LinearKernels kLinearAvx512, kLinearAvx512Bf16, kLinearAmxBf16;
#endif

}  // namespace distkv
