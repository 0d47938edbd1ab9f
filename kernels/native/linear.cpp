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

constexpr int64_t kShares = 4;  // per thread, so that a thread that starts late takes fewer

struct Work {
  const LinearCall* calls;
  int count;
  const LinearKernels& kernels;
  int64_t panels, share;
};

int64_t panels_of(const LinearCall& call) { return (call.linear.outputs + kPanelOutputs - 1) / kPanelOutputs; }

// A share of the panels of all linears, which are numbered one linear after the other.
void work(void* context, int64_t index) {
  const Work& all = *static_cast<Work*>(context);
  int64_t first = index * all.share, last = first + all.share;
  for (int i = 0; i < all.count && last > 0; ++i) {
    const int64_t panels = panels_of(all.calls[i]);
    if (first < panels) all.kernels.panels(all.calls[i], first > 0 ? first : 0, last < panels ? last : panels);
    first -= panels, last -= panels;
  }
}

void widen(float* to, const uint16_t* from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = static_cast<uint32_t>(from[i]) << 16;
    std::memcpy(to + i, &bits, 4);
  }
}

}  // namespace

bool prepare(LinearCall& call, const LinearKernels& kernels) {
  thread_local Scratch scratch;
  const bool wide = kernels.wide;
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

void multiply(const LinearCall* calls, int count, const LinearKernels& kernels, int64_t threads) {
  int64_t panels = 0;
  for (int i = 0; i < count; ++i) panels += panels_of(calls[i]);
  const int64_t shares = threads > 1 ? threads * kShares : 1;
  Work all{calls, count, kernels, panels, (panels + shares - 1) / shares};
  run_items(work, &all, (panels + all.share - 1) / all.share, threads);
}

}  // namespace distkv

// The kernels of an instruction set, by name; null if they are not compiled in or do not run here.
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
  if (!distkv::prepare(call, chosen)) return distkv::kNoMemory;
  distkv::multiply(&call, 1, chosen, linear->threads);
  return distkv::kOk;
}
DISTKV_LAYOUT(linear, distkv::Linear, DISTKV_AT(distkv::Linear, weight), DISTKV_AT(distkv::Linear, bias),
              DISTKV_AT(distkv::Linear, inputs), DISTKV_AT(distkv::Linear, outputs), DISTKV_AT(distkv::Linear, threads))
