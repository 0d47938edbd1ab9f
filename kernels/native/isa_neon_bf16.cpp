// Kernels for Arm with NEON and its bf16 dot product; setup.py compiles this file with the matching flags.
#define DISTKV_ISA neon_bf16
#define DISTKV_BF16_DOT
#include "pairs_neon.h"

#include "kernels.h"

namespace distkv {
const Kernels kNeonBf16 = DISTKV_KERNELS("neon_bf16");
}
