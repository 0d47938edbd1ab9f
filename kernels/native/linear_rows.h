// Common parts of the kernels of linear.h: the end of a panel, and a product in vector registers.
#pragma once
#include "linear.h"
#include "rounded.h"

namespace distkv {
namespace DISTKV_ISA {

// Stores the sums [rows, kPanelOutputs] of a panel, with the bias, in the outputs of rows from `row` on.
static inline void finish(const LinearCall& call, int64_t panel, int64_t row, int64_t rows, const float* sums) {
  const Linear& linear = call.linear;
  const int64_t first = panel * kPanelOutputs, left = linear.outputs - first;
  const int64_t outputs = left < kPanelOutputs ? left : kPanelOutputs;
  for (int64_t r = 0; r < rows; ++r, sums += kPanelOutputs) {
    uint16_t* out = call.out + (row + r) * linear.outputs + first;
    for (int64_t i = 0; i < outputs; ++i) out[i] = rounded(sums[i] + (linear.bias ? linear.bias[first + i] : 0.0f));
  }
}

static inline void pull(const uint16_t* weight, int64_t bytes) {
  const char* at = reinterpret_cast<const char*>(weight) + kPrefetchAhead;
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(at + i, 0, 2);
}

// Rows at a time in registers; V has the arithmetic of `Rows` rows with a pair of inputs of a panel.
template <class V, int Rows>
static void product(const LinearCall& call, int64_t panel, int64_t row) {
  const int64_t pairs = call.pairs();
  const uint16_t* weight = call.linear.weight + panel * pairs * 2 * kPanelOutputs;
  V sums[Rows];
  for (int64_t pair = 0; pair < pairs; ++pair, weight += 2 * kPanelOutputs) {
    if (row == 0) pull(weight, 4 * kPanelOutputs);
    const typename V::Weights both = V::weights(weight);
    DISTKV_UNROLL
    for (int r = 0; r < Rows; ++r) sums[r].add(both, V::row(call, row + r) + 2 * pair);
  }
  alignas(64) float all[Rows * kPanelOutputs];
  DISTKV_UNROLL
  for (int r = 0; r < Rows; ++r) sums[r].store(all + r * kPanelOutputs);
  finish(call, panel, row, Rows, all);
}

template <class V>
static void panels(const LinearCall& call, int64_t first, int64_t last) {
  for (int64_t panel = first; panel < last; ++panel) {
    int64_t row = 0;
    for (; row + 4 <= call.count; row += 4) product<V, 4>(call, panel, row);
    switch (call.count - row) {
      case 3: product<V, 3>(call, panel, row); break;
      case 2: product<V, 2>(call, panel, row); break;
      case 1: product<V, 1>(call, panel, row); break;
      default: break;
    }
  }
}

}  // namespace DISTKV_ISA
}  // namespace distkv
