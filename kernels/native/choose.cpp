// Which kernels serve this processor: what somebody chose, otherwise the first of those that are compiled in and run.
#include <atomic>
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

std::atomic<const Kernels*> chosen[kDtypes][2];  // [KV dtype][few queries, many queries]; null: nobody chose

}  // namespace

const Kernels* find(const char* name) {
  for (const Kernels* kernels : kAll)
    if (supported(kernels) && (!*name || !std::strcmp(name, kernels->name))) return kernels;
  return nullptr;
}

Served served(int64_t kv_dtype) {
  const auto one = [&](int work) {
    const Kernels* kernels = chosen[kv_dtype][work].load(std::memory_order_relaxed);
    return kernels ? kernels : find("");
  };
  return {one(0), one(1)};
}

}  // namespace distkv

// Serves calls of a KV dtype that name no instruction set, of few queries or of many, with one (empty: the first that
// runs here). Returns 0, or 1 where none of that name runs here.
DISTKV_EXPORT int distkv_choose_isa(int64_t kv_dtype, int many, const char* name) {
  const distkv::Kernels* kernels = distkv::find(name);
  if (!kernels || kv_dtype < 0 || kv_dtype >= distkv::kDtypes) return 1;
  distkv::chosen[kv_dtype][many ? 1 : 0] = kernels;
  return 0;
}

// Name of the instruction set that serves such calls.
DISTKV_EXPORT const char* distkv_isa(int64_t kv_dtype, int many) {
  const distkv::Served served = distkv::served(kv_dtype);
  return (many ? served.many : served.few)->name;
}

// Whether an instruction set, by name, can be used here.
DISTKV_EXPORT int distkv_has_isa(const char* name) { return *name && distkv::find(name) != nullptr; }
