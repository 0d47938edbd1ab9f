// Packs bf16 for matrix units and dot products of pairs: two neighbours in depth are adjacent in memory.
#pragma once

namespace distkv {
namespace DISTKV_ISA {

struct PackedPairs {
  using Cache = bf16;
  using Query = bf16;
  using Weight = bf16;
  static constexpr int kStep = 2;
  static constexpr bool kExact = false;

  static void store_weights(bf16* p, F x) { narrow(p, x); }

  static void pack_query(bf16* to, const bf16* q, int d) {
    for (int c = 0; c < d; c += 2 * W) store_pairs(to + c, load_pairs(q + c, d - c), d - c);
  }

  // W tokens' keys, transposed in pairs: elements 2i and 2i + 1 of token j go to to[i * 2 * panel + 2j]; zeros from d on.
  static void pack_keys(bf16* to, const bf16* const* row, const float*, int d, int deep, int panel) {
    int c = 0;
    for (; c + 2 * W <= d; c += 2 * W) {
      F x[W];
      DISTKV_UNROLL
      for (int j = 0; j < W; ++j) x[j] = as_floats(load_pairs(row[j] + c));
      transpose(x);
      DISTKV_UNROLL
      for (int i = 0; i < W; ++i) store((float*)(to + (c + 2 * i) * panel), x[i]);
    }
    for (; c < deep; c += 2 * W) {
      F x[W];
      DISTKV_UNROLL
      for (int j = 0; j < W; ++j) x[j] = as_floats(load_pairs(row[j] + c, d - c));
      transpose(x);
      for (int i = 0; i < W && c + 2 * i < deep; ++i) store((float*)(to + (c + 2 * i) * panel), x[i]);
    }
  }

  // Two tokens' values interleaved, cut into panels that lie `size` elements apart.
  static void pack_values(bf16* to, const bf16* const* row, const float*, int d, int panel, int size) {
    for (int c = 0; c < d; c += 2 * W) {
      bf16* at = to + c / panel * size + c % panel * 2;
      if (c + 2 * W <= d)
        interleave(load_pairs(row[0] + c), load_pairs(row[1] + c), at, at + 2 * W);
      else
        interleave(load_pairs(row[0] + c, d - c), load_pairs(row[1] + c, d - c), at, d - c > W ? at + 2 * W : nullptr);
    }
  }
};

}  // namespace DISTKV_ISA
}  // namespace distkv
