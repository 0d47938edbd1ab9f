// Kernels for x86-64 with AVX-512; setup.py compiles this file with the matching flags.
#define DISTKV_ISA avx512
#include "simd_avx512.h"

#include "kernels.h"

namespace distkv {
const Kernels kAvx512 = {"avx512", avx512::stream_bytes, avx512::stream, avx512::tile_bytes, avx512::tile, avx512::merge};
}
