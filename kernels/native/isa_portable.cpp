// Kernels for any processor; setup.py compiles this file with the matching flags.
#define DISTKV_ISA portable
#include "simd_portable.h"

#include "kernels.h"

namespace distkv {
const Kernels kPortable = DISTKV_KERNELS("portable");
}
