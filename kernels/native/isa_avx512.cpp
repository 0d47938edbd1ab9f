// Kernels for x86-64 with AVX-512; setup.py compiles this file with the matching flags.
#define DISTKV_ISA avx512
#include "simd_avx512.h"

#include "kernels.h"

namespace distkv {
const Kernels kAvx512 = DISTKV_KERNELS("avx512");
}
