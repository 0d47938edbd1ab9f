// Kernels for x86-64 with AMX tiles of bf16; setup.py compiles this file with the matching flags.
#define DISTKV_ISA amx_bf16
#include "pairs_avx512.h"

#include "amx_kernels.h"

namespace distkv {
const Kernels kAmxBf16 = DISTKV_AMX_KERNELS("amx_bf16", kAvx512Bf16);
}
