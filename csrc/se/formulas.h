// The arithmetic of one element, for a scalar or a vector of them: shared by the CPU and the CUDA passes, so that a
// gradient check of either covers the formulas of both.
#pragma once

#include <math.h>

#include <type_traits>

#if defined(__CUDACC__)
#define T2T_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define T2T_HOST_DEVICE inline
#endif

namespace t2t {

// erf and exp of V; the CPU passes specialise it for vectors.
template <class V>
struct Math {
  static T2T_HOST_DEVICE V erf(V x) {
    if constexpr (std::is_same_v<V, float>) return ::erff(x);
    else return ::erf(x);
  }
  static T2T_HOST_DEVICE V exp(V x) {
    if constexpr (std::is_same_v<V, float>) return ::expf(x);
    else return ::exp(x);
  }
};

// Phi(x), the distribution function of the standard normal.
template <class V>
T2T_HOST_DEVICE V normal_cdf(V x) {
  return V(0.5) * (V(1) + Math<V>::erf(x * V(0.70710678118654752440)));
}

template <class V>
T2T_HOST_DEVICE V gelu(V x) {
  return x * normal_cdf(x);
}

// gelu(x) = x Phi(x) and its derivative Phi(x) + x phi(x).
template <class V>
T2T_HOST_DEVICE void gelu_with_slope(V x, V& value, V& slope) {
  const V cdf = normal_cdf(x);
  value = x * cdf;
  slope = cdf + x * V(0.39894228040143267794) * Math<V>::exp(x * x * V(-0.5));
}

template <class V>
T2T_HOST_DEVICE V sigmoid(V x) {
  return V(1) / (V(1) + Math<V>::exp(V(0) - x));
}

// The gradient of the sigmoid's argument. With y = product + bias and out = scale * gate * y, the gate receives
// scale * sum(grad * y), made of the token sums of grad * product and of grad.
template <class V>
T2T_HOST_DEVICE V gate_argument_grad(V gate, V scale, V grad_dot_y) {
  return scale * grad_dot_y * gate * (V(1) - gate);
}

}  // namespace t2t
