// erf and exp of vectors, for ../se/formulas.h.
#pragma once

#include <ATen/cpu/vec/vec.h>

#include "../se/formulas.h"

namespace t2t {

template <>
struct Math<at::vec::Vectorized<double>> {
  using V = at::vec::Vectorized<double>;
  static V erf(const V& x) { return x.erf(); }
  static V exp(const V& x) { return x.exp(); }
};

template <>
struct Math<at::vec::Vectorized<float>> {
  using V = at::vec::Vectorized<float>;
  static V exp(const V& x) { return x.exp(); }

  // A rational function in x^2 (a least-squares fit weighted towards its largest error, 1.7e-8) up to 3.92, from where
  // on erf rounds to 1. In float32 it is within 5e-7 of erf, like at::vec's, in half the time.
  static V erf(const V& x) {
    const V s = x * x, bound(3.92f);
    V above(2.03524996e-06f), below(3.80646197e-05f);
    for (const float c : {2.8726444e-04f, 3.86127364e-03f, 5.30387983e-02f, 1.92607298e-01f, 1.12837899f}) {
      above = at::vec::fmadd(above, s, V(c));
    }
    for (const float c : {1.18629332e-03f, 1.51583217e-02f, 1.15018904e-01f, 5.04025519e-01f, 1.0f}) {
      below = at::vec::fmadd(below, s, V(c));
    }
    const V inside = x * above / below;  // beyond, it may be anything; a NaN stays one
    return V::blendv(V::blendv(inside, V(1), x >= bound), V(-1), x <= bound.neg());
  }
};

}  // namespace t2t
