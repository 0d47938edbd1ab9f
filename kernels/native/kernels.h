// Instantiates the kernels for one instruction set; include the vector operations first.
#pragma once
#include <math.h>

#include "register_tile.h"
#include "math_fp32.h"
#ifdef DISTKV_BF16_DOT
#include "math_bf16.h"
#endif
#include "soft_cap.h"
#include "stream.h"
#include "tile.h"

namespace distkv {
namespace DISTKV_ISA {

template <class M>
struct Math {
  using Type = M;
};

#ifdef DISTKV_BF16_DOT
using StreamBf16 = Bf16Scores;
using TileBf16 = Bf16;
#else
using StreamBf16 = Fp32<bf16>;
using TileBf16 = Fp32<bf16>;
#endif

// Calls use(Math<M>{}) with the arithmetic M for the call's types.
template <class OfBf16, class Use>
static auto with_math(const Args& a, Use use) {
  switch (a.kv_dtype) {
    case kBf16: return use(Math<OfBf16>{});
    case kFp16: return use(Math<Fp32<fp16>>{});
    case kInt8: return use(Math<Fp32<int8_t>>{});
    default: return use(Math<Fp32<float>>{});
  }
}

static int64_t stream_bytes(const Args& a, int64_t queries) {
  return with_math<StreamBf16>(a, [&](auto m) { return Stream<typename decltype(m)::Type, 0>::bytes(a, queries); });
}
static void stream(const Args& a, const Item& it, char* scratch) {
  with_math<StreamBf16>(a, [&](auto m) {
    using M = typename decltype(m)::Type;
    switch (a.d_v == a.d && a.v_token == a.d ? a.d : 0) {
      case 64: return Stream<M, 64>::run(a, it, scratch);
      case 128: return Stream<M, 128>::run(a, it, scratch);
      default: return Stream<M, 0>::run(a, it, scratch);
    }
  });
}
static int64_t tile_bytes(const Args& a, int64_t queries) {
  return with_math<TileBf16>(a, [&](auto m) { return Tile<typename decltype(m)::Type>::bytes(a, queries); });
}
static void tile(const Args& a, const Item& it, char* scratch) {
  with_math<TileBf16>(a, [&](auto m) { Tile<typename decltype(m)::Type>::run(a, it, scratch); });
}

// out, lse [rows, d], [rows] merged with a partial result of the same shape; (0, -inf) on either side changes nothing.
static void merge(float* out, float* lse, const float* part_out, const float* part_lse, int64_t rows, int64_t d) {
  for (int64_t r = 0; r < rows; ++r, out += d, part_out += d) {
    if (part_lse[r] == -INFINITY) continue;
    const float gap = part_lse[r] - lse[r];  // +inf if nothing has been merged yet
    const float small = expf(-fabsf(gap));
    const float minor = small / (1 + small), major = 1 / (1 + small);
    const float keep = gap > 0 ? minor : major, take = gap > 0 ? major : minor;
    for (int64_t i = 0; i < d; i += 4)
      for (int64_t c = i; c < i + 4; ++c) out[c] = out[c] * keep + part_out[c] * take;
    lse[r] = (gap > 0 ? part_lse[r] : lse[r]) + log1pf(small);
  }
}

}  // namespace DISTKV_ISA
}  // namespace distkv

// All kernels of this instruction set.
#define DISTKV_KERNELS(name)                                                                                    \
  {                                                                                                             \
    name, nullptr, DISTKV_ISA::stream_bytes, DISTKV_ISA::stream, DISTKV_ISA::RegisterTile::kItemRows, DISTKV_ISA::tile_bytes, \
        DISTKV_ISA::tile, DISTKV_ISA::merge                                                                     \
  }
