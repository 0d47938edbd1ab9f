// Linears with few rows on AMX tiles: 32 rows x 32 outputs at a time. Include DISTKV_ISA and tile instructions first.
#pragma once
#include "linear_rows.h"

namespace distkv {
namespace DISTKV_ISA {

// Tiles have no more rows than needed, which makes their products shorter. Tiles 0 to 3 are sums, 4 and 5 rows, 6 and 7
// weights.
template <bool Lower>
static void tile_product(const LinearCall& call, int64_t panel, int64_t row) {
  const int64_t pairs = call.pairs(), stride = call.stride * 2;
  const uint16_t* weight = call.linear.weight + panel * pairs * 2 * kPanelOutputs;
  const uint16_t *upper = call.rows + row * call.stride, *lower = upper + 16 * call.stride;
  alignas(64) float sums[32 * kPanelOutputs];
  _tile_zero(0);
  _tile_zero(1);
  if (Lower) _tile_zero(2);
  if (Lower) _tile_zero(3);
  for (int64_t pair = 0; pair < pairs; pair += 16, weight += 16 * 2 * kPanelOutputs) {
    if (row == 0) pull(weight, 16 * 4 * kPanelOutputs);
    _tile_loadd(6, weight, 4 * kPanelOutputs);
    _tile_loadd(4, upper + 2 * pair, stride);
    _tile_loadd(7, weight + kPanelOutputs, 4 * kPanelOutputs);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if (Lower) {
      _tile_loadd(5, lower + 2 * pair, stride);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sums, 4 * kPanelOutputs);
  _tile_stored(1, sums + 16, 4 * kPanelOutputs);
  if (Lower) _tile_stored(2, sums + 16 * kPanelOutputs, 4 * kPanelOutputs);
  if (Lower) _tile_stored(3, sums + 16 * kPanelOutputs + 16, 4 * kPanelOutputs);
  asm volatile("" ::: "memory");  // the compiler does not know which memory a tile is stored to
  const int64_t left = call.count - row;
  finish(call, panel, row, left < 32 ? left : 32, sums);
}

static void tile_panels(const LinearCall& call, int64_t first, int64_t last) {
  alignas(64) uint8_t config[64] = {1};  // palette
  const uint8_t few = static_cast<uint8_t>(call.count < 16 ? call.count : 16);
  for (int tile = 0; tile < 8; ++tile) config[16 + 2 * tile] = 64, config[48 + tile] = tile < 6 ? few : 16;
  asm volatile("" ::: "memory");
  _tile_loadconfig(config);
  for (int64_t panel = first; panel < last; ++panel)
    for (int64_t row = 0; row < call.count; row += 32)
      call.count - row > 16 ? tile_product<true>(call, panel, row) : tile_product<false>(call, panel, row);
  _tile_release();
}

}  // namespace DISTKV_ISA
}  // namespace distkv
