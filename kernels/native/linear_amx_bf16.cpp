// Linears with few rows on AMX tiles of bf16.
#define DISTKV_ISA amx_bf16
#include <immintrin.h>

#include "linear_amx.h"

namespace distkv {
const LinearKernels kLinearAmxBf16 = {"amx_bf16", false, DISTKV_ISA::tile_panels};
}
