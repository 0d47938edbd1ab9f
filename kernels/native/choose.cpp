// Which kernels serve this processor: the instruction sets that are compiled in, the best first.
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "core.h"

namespace distkv {

static bool is_amd_zen5() {
#if defined(__x86_64__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid(0, &a, &b, &c, &d) || c != signature_AMD_ecx) return false;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return false;
  return ((a >> 8) & 15) + ((a >> 20) & 255) == 0x1a;  // family
#else
  return false;
#endif
}
const bool kAskIntoFirstLevel = is_amd_zen5();

namespace {

const Kernels* const kAll[] = {
#if defined(__x86_64__)
    &kAvx512Bf16, &kAvx512, &kAvx2,
#endif
    &kPortable};

bool supported(const Kernels* kernels) {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (kernels == &kAvx2) return avx2;
  if (kernels == &kAvx512) return avx512;
  if (kernels == &kAvx512Bf16) return avx512 && __builtin_cpu_supports("avx512bf16");
#endif
  return kernels == &kPortable;
}

}  // namespace

const Kernels* find(const char* name) {
  for (const Kernels* kernels : kAll)
    if (supported(kernels) && (!*name || !std::strcmp(name, kernels->name))) return kernels;
  return nullptr;
}

}  // namespace distkv

// Name of the best instruction set that is compiled in and that this processor has.
DISTKV_EXPORT const char* distkv_isa() { return distkv::find("")->name; }

// Whether an instruction set, by name, can be used here.
DISTKV_EXPORT int distkv_has_isa(const char* name) { return *name && distkv::find(name) != nullptr; }
