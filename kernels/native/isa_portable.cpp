// Kernels for any processor; setup.py compiles this file with the matching flags.
#define DISTKV_ISA portable
#include "simd_portable.h"

#include "kernels.h"

namespace distkv {
const Kernels kPortable = {"portable", portable::stream_bytes, portable::stream, portable::tile_bytes, portable::tile, portable::merge};
}
