// The AMX tile instructions in software, under Intel's names, for tests on processors without tiles.
//
// After "Intel 64 and IA-32 Architectures Software Developer's Manual", volume 2, TILELOADD, TDPBF16PS and LDTILECFG.
// Where the processor raises #UD or #GP, the process ends here too. It also ends if a thread configures tiles twice
// without releasing them, which the processor would allow.
#pragma once
#include <stdint.h>

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps

namespace distkv {
namespace DISTKV_ISA {

struct TileRegister {
  int rows, bytes;  // of a row; 0: not configured
  uint8_t data[16][64];
};
static thread_local TileRegister tile_registers[8];
static thread_local bool tiles_configured = false;

static inline void demand(bool fulfilled) {
  if (!fulfilled) __builtin_trap();
}
static inline TileRegister& tile_register(int tile) {
  demand(tiles_configured && tile >= 0 && tile < 8 && tile_registers[tile].rows > 0);
  return tile_registers[tile];
}

static inline void _tile_loadconfig(const void* memory) {
  const uint8_t* config = (const uint8_t*)memory;
  demand(!tiles_configured && config[0] == 1 && config[1] == 0);
  for (int i = 2; i < 16; ++i) demand(config[i] == 0);
  for (int i = 32; i < 48; ++i) demand(config[i] == 0);  // there are 8 tiles, not 16
  for (int i = 56; i < 64; ++i) demand(config[i] == 0);
  for (int t = 0; t < 8; ++t) {
    const int bytes = config[16 + 2 * t] | config[17 + 2 * t] << 8, rows = config[48 + t];
    demand(rows <= 16 && bytes <= 64 && (rows == 0) == (bytes == 0));
    tile_registers[t] = TileRegister{rows, bytes, {}};
  }
  tiles_configured = true;
}
static inline void _tile_release() {
  for (TileRegister& each : tile_registers) each = TileRegister{};
  tiles_configured = false;
}

static inline void _tile_zero(int tile) {
  TileRegister& to = tile_register(tile);
  __builtin_memset(to.data, 0, sizeof to.data);
}
static inline void _tile_loadd(int tile, const void* base, int64_t stride) {
  TileRegister& to = tile_register(tile);
  __builtin_memset(to.data, 0, sizeof to.data);
  for (int r = 0; r < to.rows; ++r) __builtin_memcpy(to.data[r], (const char*)base + r * stride, to.bytes);
}
static inline void _tile_stored(int tile, void* base, int64_t stride) {
  const TileRegister& from = tile_register(tile);
  for (int r = 0; r < from.rows; ++r) __builtin_memcpy((char*)base + r * stride, from.data[r], from.bytes);
}

// Denormals are zero, as operands and as results.
static inline float flushed(float x) { return __builtin_fabsf(x) < 0x1p-126f ? __builtin_copysignf(0, x) : x; }
static inline float bf16_at(const uint8_t* row, int i) {
  uint16_t half;
  __builtin_memcpy(&half, row + 2 * i, 2);
  const uint32_t bits = (uint32_t)half << 16;
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return flushed(x);
}
// sum + x * y, rounded once. The double is exact wherever rounding it again could matter: the product has 16 binary
// digits and the sum 24, so only operands whose digits all fit into 53 give the exact middle between two floats.
static inline float multiply_add_once(float sum, float x, float y) {
  return flushed((float)((double)x * (double)y + (double)sum));
}

// c[m][n] += the sum over even pairs' elements, plus the sum over odd ones: two sums in order of depth, added at the end.
static inline void _tile_dpbf16ps(int c, int a, int b) {
  TileRegister& to = tile_register(c);
  const TileRegister &left = tile_register(a), &right = tile_register(b);
  const int depth = left.bytes / 4, columns = to.bytes / 4;
  demand(c != a && c != b && a != b && to.rows == left.rows && to.bytes == right.bytes && depth == right.rows);
  float y[16][32];
  for (int k = 0; k < depth; ++k)
    for (int n = 0; n < 2 * columns; ++n) y[k][n] = bf16_at(right.data[k], n);
  for (int m = 0; m < to.rows; ++m) {
    float even[16] = {}, odd[16] = {}, sum[16];
    for (int k = 0; k < depth; ++k) {
      const float x0 = bf16_at(left.data[m], 2 * k), x1 = bf16_at(left.data[m], 2 * k + 1);
      for (int n = 0; n < columns; ++n) {
        even[n] = multiply_add_once(even[n], x0, y[k][2 * n]);
        odd[n] = multiply_add_once(odd[n], x1, y[k][2 * n + 1]);
      }
    }
    __builtin_memcpy(sum, to.data[m], to.bytes);
    for (int n = 0; n < columns; ++n) sum[n] = flushed(flushed(sum[n]) + flushed(even[n] + odd[n]));
    __builtin_memset(to.data[m], 0, sizeof to.data[m]);
    __builtin_memcpy(to.data[m], sum, to.bytes);
  }
}

}  // namespace DISTKV_ISA
}  // namespace distkv
