// The operations between matrix products, for any processor.
#define DISTKV_ISA portable_elementwise
#include "simd_portable.h"

#include "rounded.h"

namespace distkv {
namespace DISTKV_ISA {

static inline void narrow(F x, uint16_t* to) {
  for (int i = 0; i < W; ++i) to[i] = rounded(x[i]);
}
static inline F rounded_once(F x) {
  uint16_t bits[W];
  narrow(x, bits);
  return load_kv(reinterpret_cast<const bf16*>(bits));
}

}  // namespace DISTKV_ISA
}  // namespace distkv

#include "elementwise.h"

namespace distkv {
const Elementwise kElementwisePortable = DISTKV_ELEMENTWISE("portable");
}
