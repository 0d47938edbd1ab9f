// A matrix product on AMX tiles: 32 rows x 32 columns at a time in four tiles, 32 numbers of depth per step.
//
// The instructions have Intel's names. The header included before this one defines them: the processor's own
// (immintrin.h, with -mamx-tile -mamx-bf16), or software (amx_model.h).
#pragma once
#include "pack_pairs.h"

// The compiler does not know which memory a tile is loaded from.
#define DISTKV_WRITTEN asm volatile("" ::: "memory")

namespace distkv {
namespace DISTKV_ISA {

struct AmxTile {
  static constexpr int kRows = 32;
  static constexpr int kPanel = 32;
  static constexpr int kTokens = 32;
  static constexpr int kDepth = 32;
  static constexpr int kAhead = 8;
  static constexpr int64_t kItemRows = 384;  // products are so fast that packing must serve more rows
  static constexpr bool kBesideVectors = true;

  // The tile registers of a thread, configured while one of its items is computed: 8 tiles of 16 rows of 64 bytes. An
  // idle thread has none, so that the system need not save them.
  struct Session {
    Session() {
      alignas(64) uint8_t config[64] = {1};  // palette
      for (int tile = 0; tile < 8; ++tile) config[16 + 2 * tile] = 64, config[48 + tile] = 16;
      DISTKV_WRITTEN;
      _tile_loadconfig(config);
    }
    ~Session() { _tile_release(); }
  };

  // c[m][n] (+)= a[m] . b over `steps` pairs; the panel b holds kPanel pairs per step.
  template <class M, bool Add>
  static void product(int rows, int columns, const bf16* a, int64_t lda, const bf16* b, int steps, float* c,
                      int64_t ldc) {
    if (rows > 16) return columns > 16 ? multiply<true, true, Add>(a, lda, b, steps, c, ldc)
                                       : multiply<true, false, Add>(a, lda, b, steps, c, ldc);
    return columns > 16 ? multiply<false, true, Add>(a, lda, b, steps, c, ldc)
                        : multiply<false, false, Add>(a, lda, b, steps, c, ldc);
  }

 private:
  // Tiles 0 to 3 are c, (upper, left), (upper, right), (lower, left), (lower, right); 4 and 5 are a, 6 and 7 are b.
  template <bool Lower, bool Right, bool Add>
  static inline void multiply(const bf16* a, int64_t lda, const bf16* b, int steps, float* c, int64_t ldc) {
    float* lower = c + 16 * ldc;
    DISTKV_WRITTEN;
    if (Add) {
      _tile_loadd(0, c, ldc * 4);
      if (Right) _tile_loadd(1, c + 16, ldc * 4);
      if (Lower) _tile_loadd(2, lower, ldc * 4);
      if (Lower && Right) _tile_loadd(3, lower + 16, ldc * 4);
    } else {
      _tile_zero(0);
      if (Right) _tile_zero(1);
      if (Lower) _tile_zero(2);
      if (Lower && Right) _tile_zero(3);
    }
    for (int k = 0; k < steps; k += 16, a += 32, b += 16 * 2 * kPanel) {
      _tile_loadd(4, a, lda * 2);
      _tile_loadd(6, b, kPanel * 4);
      _tile_dpbf16ps(0, 4, 6);
      if (Right) {
        _tile_loadd(7, b + 32, kPanel * 4);
        _tile_dpbf16ps(1, 4, 7);
      }
      if (Lower) {
        _tile_loadd(5, a + 16 * lda, lda * 2);
        _tile_dpbf16ps(2, 5, 6);
        if (Right) _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, c, ldc * 4);
    if (Right) _tile_stored(1, c + 16, ldc * 4);
    if (Lower) _tile_stored(2, lower, ldc * 4);
    if (Lower && Right) _tile_stored(3, lower + 16, ldc * 4);
    DISTKV_WRITTEN;
  }
};

struct AmxBf16 : PackedPairs {
  using Tiles = AmxTile;
};

}  // namespace DISTKV_ISA
}  // namespace distkv
