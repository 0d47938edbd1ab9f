// The kernels of linear_amx_bf16.cpp with tile instructions in software.
#define DISTKV_ISA amx_model
#include "amx_model.h"

#include "linear_amx.h"

namespace distkv {
const LinearKernels kLinearAmxModel = {"amx_model", false, DISTKV_ISA::tile_panels};
}
