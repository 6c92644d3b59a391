// The operators' schemas, and build_info() for `python -m t2t_fast env`. Shapes for torch.compile, gradients and
// argument checks are Python's: t2t_fast/ops/<family>/.
#include <torch/library.h>

#include "attention/attention.h"
#include "performer/layer.h"
#include "se/se_gate.h"
#include "se/se_mlp.h"
#include "soft_split/windows_linear.h"

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
  library.def("attention(Tensor q, Tensor k, Tensor v, float scale, bool differentiate) -> (Tensor output, Tensor lse)");
  library.def(
      "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor output, Tensor lse, float scale)"
      " -> (Tensor q, Tensor k, Tensor v)");
  library.def(
      "performer_layer(Tensor kqv, Tensor? proj_mask, Tensor? mlp_mask, Tensor w, Tensor proj_weight, Tensor proj_bias,"
      " Tensor norm_weight, Tensor norm_bias, Tensor fc1_weight, Tensor fc1_bias, Tensor fc2_weight, Tensor fc2_bias,"
      " float eps, float norm_eps) -> (Tensor output, Tensor total, Tensor summary)");
  library.def(
      "performer_layer_backward(Tensor grad, Tensor kqv, Tensor? proj_mask, Tensor? mlp_mask, Tensor w,"
      " Tensor proj_weight, Tensor proj_bias, Tensor norm_weight, Tensor norm_bias, Tensor fc1_weight, Tensor fc1_bias,"
      " Tensor fc2_weight, Tensor fc2_bias, Tensor total, Tensor summary, float eps, float norm_eps, bool needs_w)"
      " -> Tensor[]");
  library.def(
      "windows_linear(Tensor image, Tensor weight, Tensor? offset, int[2] kernel_size, int[2] stride, int[2] padding,"
      " bool normed, float eps) -> Tensor");
  library.impl("attention", torch::dispatch(c10::DispatchKey::CPU, &t2t::attention));
  library.impl("attention_backward", torch::dispatch(c10::DispatchKey::CPU, &t2t::attention_backward));
  library.impl("performer_layer", torch::dispatch(c10::DispatchKey::CPU, &t2t::performer_layer));
  library.impl("performer_layer_backward", torch::dispatch(c10::DispatchKey::CPU, &t2t::performer_layer_backward));
  library.impl("windows_linear", torch::dispatch(c10::DispatchKey::CPU, &t2t::windows_linear));
  for (const auto key : {c10::DispatchKey::CPU, c10::DispatchKey::CUDA}) {
    library.impl("se_gate", torch::dispatch(key, &t2t::se_gate));
    library.impl("se_gate_backward", torch::dispatch(key, &t2t::se_gate_backward));
    library.impl("se_mlp", torch::dispatch(key, &t2t::se_mlp));
    library.impl("se_mlp_backward", torch::dispatch(key, &t2t::se_mlp_backward));
  }
}
