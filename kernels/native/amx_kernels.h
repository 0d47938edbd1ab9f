// Instantiates the AMX tile; include vectors, pairs and tile instructions first. Few queries and types other than bf16
// are left to other kernels: decode is limited by memory, and int8 tiles would need int8 queries.
#pragma once
#include <math.h>

#include "register_tile.h"
#include "math_fp32.h"
#include "soft_cap.h"
#include "stream.h"
#include "amx_tile.h"
#include "tile.h"

namespace distkv {
namespace DISTKV_ISA {

static int64_t tile_bytes(const Args& a, int64_t queries) { return Tile<AmxBf16>::bytes(a, queries); }
static void tile(const Args& a, const Item& it, char* scratch) { Tile<AmxBf16>::run(a, it, scratch); }

}  // namespace DISTKV_ISA
}  // namespace distkv

// The kernels, and those that serve the rest.
#define DISTKV_AMX_KERNELS(name, base)                                                                               \
  {                                                                                                                  \
    name, &base, nullptr, nullptr, DISTKV_ISA::AmxTile::kItemRows, DISTKV_ISA::tile_bytes, DISTKV_ISA::tile, nullptr \
  }
