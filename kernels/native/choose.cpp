// The kernels for this processor: those that were chosen, otherwise the first that are compiled in and supported.
#include <atomic>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/auxv.h>
#include <sys/syscall.h>
#include <unistd.h>
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

// setup.py defines DISTKV_HAS_... for what the compiler could build.
const Kernels* const kAll[] = {
#if defined(DISTKV_HAS_AMX_BF16)
    &kAmxBf16,
#endif
#if defined(DISTKV_HAS_AVX512_BF16)
    &kAvx512Bf16,
#endif
#if defined(__x86_64__)
    &kAvx512, &kAvx2,
#endif
#if defined(DISTKV_HAS_NEON_BF16)
    &kNeonBf16,
#endif
#if defined(__aarch64__)
    &kNeon,
#endif
    &kPortable,
// in software, used only by name: portable kernels come first and run everywhere
#if defined(DISTKV_HAS_AVX512_BF16)
    &kAmxModelAvx512,
#endif
    &kAmxModel};

#if defined(__x86_64__)
// Whether the processor has tiles of bf16, and the system lets this process use them. A Linux process has to ask
// once for all of its threads and children, because tiles make signal frames larger. If a hypervisor hides tiles or the
// kernel refuses them, the answer is no, and no tile instruction is ever executed.
bool ask_for_tiles() {
#if defined(DISTKV_HAS_AMX_BF16) && defined(__linux__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kTile = 1u << 24, kBf16 = 1u << 22, kOsxsave = 1u << 27, kTileStates = 3u << 17;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & kOsxsave)) return false;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (kTile | kBf16)) != (kTile | kBf16)) return false;
  unsigned low, high;
  asm("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  if ((low & kTileStates) != kTileStates) return false;
  constexpr long kGetPermission = 0x1022, kRequestPermission = 0x1023, kTileData = 18;
  uint64_t permitted = 0;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0 &&
         syscall(SYS_arch_prctl, kGetPermission, &permitted) == 0 && (permitted >> kTileData & 1);
#else
  return false;
#endif
}
#endif

bool supported(const Kernels* kernels) {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool avx512_bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  if (kernels == &kAvx2) return avx2;
  if (kernels == &kAvx512) return avx512;
#if defined(DISTKV_HAS_AVX512_BF16)
  if (kernels == &kAvx512Bf16 || kernels == &kAmxModelAvx512) return avx512_bf16;
#endif
#if defined(DISTKV_HAS_AMX_BF16)
  static const bool tiles = avx512_bf16 && ask_for_tiles();
  if (kernels == &kAmxBf16) return tiles;
#endif
#endif
#if defined(__aarch64__)
#if defined(DISTKV_HAS_NEON_BF16) && defined(__linux__)
  constexpr unsigned long kBf16 = 1ul << 14;  // HWCAP2_BF16, which older headers do not define
  if (kernels == &kNeonBf16) return getauxval(AT_HWCAP2) & kBf16;
#endif
  if (kernels == &kNeon) return true;
#endif
  return kernels == &kPortable || kernels == &kAmxModel;
}

std::atomic<const Kernels*> chosen[kDtypes][2];  // [KV dtype][few queries, many queries]; null: none was chosen

}  // namespace

const Kernels* find(const char* name) {
  for (const Kernels* kernels : kAll)
    if (supported(kernels) && (!*name || !std::strcmp(name, kernels->name))) return kernels;
  return nullptr;
}

Served served_by(const Kernels* kernels, int64_t kv_dtype) {
  const Kernels* base = kernels->base ? kernels->base : kernels;
  return {base, kv_dtype == kBf16 ? kernels : base};
}

Served served(int64_t kv_dtype) {
  const auto one = [&](int work) {
    const Kernels* kernels = chosen[kv_dtype][work].load(std::memory_order_relaxed);
    return served_by(kernels ? kernels : find(""), kv_dtype);
  };
  return {one(0).few, one(1).many};
}

}  // namespace distkv

// Sets the default instruction set for a KV dtype and few or many queries (empty: the first that runs here). Returns 0,
// or 1 if none of that name runs here.
DISTKV_EXPORT int distkv_choose_isa(int64_t kv_dtype, int many, const char* name) {
  const distkv::Kernels* kernels = distkv::find(name);
  if (!kernels || kv_dtype < 0 || kv_dtype >= distkv::kDtypes) return 1;
  distkv::chosen[kv_dtype][many ? 1 : 0] = kernels;
  return 0;
}

// Name of the default instruction set for a KV dtype and few or many queries.
DISTKV_EXPORT const char* distkv_isa(int64_t kv_dtype, int many) {
  const distkv::Served served = distkv::served(kv_dtype);
  return (many ? served.many : served.few)->name;
}

// Whether an instruction set, by name, can be used here.
DISTKV_EXPORT int distkv_has_isa(const char* name) { return *name && distkv::find(name) != nullptr; }
