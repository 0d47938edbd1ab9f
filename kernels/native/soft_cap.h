// The soft cap of scores, cap * tanh(score / cap), before the softmax.
#pragma once

namespace distkv {
namespace DISTKV_ISA {

// Within two roundings, for tiny arguments too: a polynomial (Cephes tanhf), and from 0.625 on an exponential.
static inline F tanh(F x) {
  const F size = where_less(x, zero(), sub(zero(), x), x), square = mul(size, size);
  F p = set1(-5.70498872745e-3f);
  p = fma(p, square, set1(2.06390887954e-2f));
  p = fma(p, square, set1(-5.37397155531e-2f));
  p = fma(p, square, set1(1.33314422036e-1f));
  p = fma(p, square, set1(-3.33332819422e-1f));
  const F near = fma(mul(p, square), size, size);
  const F fall = exp2<true>(mul(size, set1(-2 * kLog2E)));
  const F far = div(sub(set1(1), fall), add(set1(1), fall));
  const F y = where_less(size, set1(0.625f), near, far);
  return where_less(x, zero(), sub(zero(), y), y);
}

// Factors that turn products into scores: the softmax takes outer * tanh(inner * product), or outer * product without a
// soft cap, in units of log2.
struct Factors {
  bool capped;
  float inner, outer;

  Factors(const Args& a, bool may_cap, float k_scale)
      : capped(may_cap && a.soft_cap > 0),
        inner(capped ? (float)(a.scale / a.soft_cap) * k_scale : 1),
        outer(capped ? (float)a.soft_cap * kLog2E : (float)a.scale * kLog2E * k_scale) {}

  void cap(float* s, int n) const {
    if (!capped) return;
    for (int j = 0; j < n; j += W) store(s + j, tanh(mul(load(s + j), set1(inner))));
  }
};

}  // namespace DISTKV_ISA
}  // namespace distkv
