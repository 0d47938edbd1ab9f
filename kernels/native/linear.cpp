// The plain C interface of linear.h: finds the kernels of an instruction set, pads rows, and divides panels among threads.
#include "linear.h"

#include <cstring>

#include "pool.h"
#include "scratch.h"

namespace distkv {
namespace {

const LinearKernels* const kAll[] = {
#if defined(DISTKV_HAS_AMX_BF16)
    &kLinearAmxBf16,
#endif
#if defined(DISTKV_HAS_AVX512_BF16)
    &kLinearAvx512Bf16,
#endif
#if defined(__x86_64__)
    &kLinearAvx512,
#endif
    &kLinearAmxModel};

constexpr int64_t kShares = 4;  // of each thread, so that one that is late takes fewer

struct Work {
  const LinearCall& call;
  const LinearKernels& kernels;
  int64_t panels, share;
};

void work(void* context, int64_t index) {
  const Work& all = *static_cast<Work*>(context);
  const int64_t first = index * all.share, last = first + all.share;
  all.kernels.panels(all.call, first, last < all.panels ? last : all.panels);
}

void widen(float* to, const uint16_t* from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = static_cast<uint32_t>(from[i]) << 16;
    std::memcpy(to + i, &bits, 4);
  }
}

// Rows as the kernels take them: padded with zeros, and in fp32 if asked for. False: no memory.
bool prepare(LinearCall& call, bool wide) {
  thread_local Scratch scratch;
  const int64_t inputs = call.linear.inputs, padded = 2 * call.pairs();
  if (!wide && padded == inputs && (call.count <= kRowBlock || call.count % kRowBlock == 0)) return true;
  const int64_t rows = (call.count + kRowBlock - 1) / kRowBlock * kRowBlock;
  char* memory = scratch.reserve(rows * padded * static_cast<int64_t>(wide ? sizeof(float) : sizeof(uint16_t)));
  if (!memory) return false;
  std::memset(memory, 0, rows * padded * (wide ? sizeof(float) : sizeof(uint16_t)));
  for (int64_t r = 0; r < call.count; ++r) {
    const uint16_t* from = call.rows + r * call.stride;
    if (wide)
      widen(reinterpret_cast<float*>(memory) + r * padded, from, inputs);
    else
      std::memcpy(memory + r * padded * sizeof(uint16_t), from, inputs * sizeof(uint16_t));
  }
  if (wide)
    call.wide = reinterpret_cast<float*>(memory);
  else
    call.rows = reinterpret_cast<uint16_t*>(memory), call.stride = padded;
  return true;
}

}  // namespace
}  // namespace distkv

// The kernels of an instruction set, by name; null where they are not compiled in or do not run here.
DISTKV_EXPORT const void* distkv_linear_kernels(const char* name) {
  for (const distkv::LinearKernels* kernels : distkv::kAll)
    if (!std::strcmp(name, kernels->name) && distkv::find(name)) return kernels;
  return nullptr;
}

// out [count, outputs] = rows [count, inputs], `stride` elements apart, times the weights. Returns a distkv::Status.
DISTKV_EXPORT int distkv_linear(const distkv::Linear* linear, const void* kernels, const uint16_t* rows, int64_t count,
                                int64_t stride, uint16_t* out) {
  const auto& chosen = *static_cast<const distkv::LinearKernels*>(kernels);
  distkv::LinearCall call{*linear, rows, nullptr, count, stride, out};
  if (!distkv::prepare(call, chosen.wide)) return distkv::kNoMemory;
  const int64_t panels = (linear->outputs + distkv::kPanelOutputs - 1) / distkv::kPanelOutputs;
  const int64_t shares = linear->threads > 1 ? linear->threads * distkv::kShares : 1;
  distkv::Work all{call, chosen, panels, (panels + shares - 1) / shares};
  distkv::run_items(distkv::work, &all, (panels + all.share - 1) / all.share, linear->threads);
  return distkv::kOk;
}
DISTKV_LAYOUT(linear, distkv::Linear, DISTKV_AT(distkv::Linear, weight), DISTKV_AT(distkv::Linear, bias),
              DISTKV_AT(distkv::Linear, inputs), DISTKV_AT(distkv::Linear, outputs), DISTKV_AT(distkv::Linear, threads))
