// Kernels for Arm with NEON, which every AArch64 has.
#define DISTKV_ISA neon
#include "simd_neon.h"

#include "kernels.h"

namespace distkv {
const Kernels kNeon = DISTKV_KERNELS("neon");
}
