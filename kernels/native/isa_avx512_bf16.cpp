// Kernels for x86-64 with AVX-512 and its bf16 dot product; setup.py compiles this file with the matching flags.
#define DISTKV_ISA avx512_bf16
#define DISTKV_BF16_DOT
#include "simd_avx512.h"

#include "kernels.h"

namespace distkv {
const Kernels kAvx512Bf16 = {"avx512_bf16", avx512_bf16::stream_bytes, avx512_bf16::stream, avx512_bf16::tile_bytes, avx512_bf16::tile, avx512_bf16::merge};
}
