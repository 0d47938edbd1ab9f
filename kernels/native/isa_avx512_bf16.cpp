// Kernels for x86-64 with AVX-512 and its bf16 dot product; setup.py compiles this file with the matching flags.
#define DISTKV_ISA avx512_bf16
#define DISTKV_BF16_DOT
#include "pairs_avx512.h"

#include "kernels.h"

namespace distkv {
const Kernels kAvx512Bf16 = DISTKV_KERNELS("avx512_bf16");
}
