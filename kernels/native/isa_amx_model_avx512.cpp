// The kernels of isa_amx_bf16.cpp with tile instructions in software; everything else is as on AMX.
#define DISTKV_ISA amx_model_avx512
#include "pairs_avx512.h"

#include "amx_model.h"

#include "amx_kernels.h"

namespace distkv {
const Kernels kAmxModelAvx512 = DISTKV_AMX_KERNELS("amx_model_avx512", kAvx512Bf16);
}
