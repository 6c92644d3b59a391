// The operators' schemas, and build_info() for `python -m t2t_fast env`. Shapes for torch.compile, gradients and
// argument checks are Python's: t2t_fast/ops/<family>/.
#include <torch/library.h>

#include "se/se_gate.h"
#include "se/se_mlp.h"

#ifndef T2T_FAST_LIBRARY
#define T2T_FAST_LIBRARY t2t_fast
#endif

// Tokens (x, residual, grad, hidden, product) are contiguous or not; biases, gate weights, scale, mean, reduced and
// gate are float32, or float64 for float64 tokens. A gradient nobody asked for is computed all the same.
TORCH_LIBRARY_FRAGMENT(T2T_FAST_LIBRARY, library) {
  library.def(
      "se_gate(Tensor x, Tensor w_reduce, Tensor w_expand, Tensor? residual, Tensor? scale)"
      " -> (Tensor output, Tensor mean, Tensor reduced, Tensor gate)");
  library.def(
      "se_gate_backward(Tensor grad, Tensor x, Tensor mean, Tensor reduced, Tensor gate, Tensor w_reduce,"
      " Tensor w_expand, Tensor? scale) -> (Tensor x, Tensor w_reduce, Tensor w_expand, Tensor scale)");
  library.def(
      "se_mlp(Tensor x, Tensor fc1_weight, Tensor? fc1_bias, Tensor fc2_weight, Tensor? fc2_bias, Tensor w_reduce,"
      " Tensor w_expand, Tensor? residual, Tensor? scale, bool differentiate)"
      " -> (Tensor output, Tensor hidden, Tensor product, Tensor mean, Tensor reduced, Tensor gate)");
  library.def(
      "se_mlp_backward(Tensor grad, Tensor x, Tensor fc1_weight, Tensor? fc1_bias, Tensor fc2_weight,"
      " Tensor? fc2_bias, Tensor w_reduce, Tensor w_expand, Tensor? scale, Tensor hidden, Tensor product,"
      " Tensor mean, Tensor reduced, Tensor gate)"
      " -> (Tensor x, Tensor fc1_weight, Tensor fc1_bias, Tensor fc2_weight, Tensor fc2_bias, Tensor w_reduce,"
      " Tensor w_expand, Tensor scale)");
  for (const auto key : {c10::DispatchKey::CPU, c10::DispatchKey::CUDA}) {
    library.impl("se_gate", torch::dispatch(key, &t2t::se_gate));
    library.impl("se_gate_backward", torch::dispatch(key, &t2t::se_gate_backward));
    library.impl("se_mlp", torch::dispatch(key, &t2t::se_mlp));
    library.impl("se_mlp_backward", torch::dispatch(key, &t2t::se_mlp_backward));
  }
}
