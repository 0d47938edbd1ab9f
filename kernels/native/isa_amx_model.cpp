// The kernels of isa_amx_bf16.cpp with tile instructions in software and vectors of any processor.
#define DISTKV_ISA amx_model
#include "pairs_portable.h"

#include "amx_model.h"

#include "amx_kernels.h"

namespace distkv {
const Kernels kAmxModel = DISTKV_AMX_KERNELS("amx_model", kPortable);
}
