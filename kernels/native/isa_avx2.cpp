// Kernels for x86-64 with AVX2, FMA and F16C; setup.py compiles this file with the matching flags.
#define DISTKV_ISA avx2
#include "simd_avx2.h"

#include "kernels.h"

namespace distkv {
const Kernels kAvx2 = DISTKV_KERNELS("avx2");
}
