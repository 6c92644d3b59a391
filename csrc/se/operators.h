// What torch.ops.t2t_fast.se_mlp and se_gate and their backwards share: tensors to the passes' arguments.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "../device.h"
#include "passes.h"

namespace t2t {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

Type type_of(const Tensor& tokens);
Extent extent_of(const Tensor& tokens);
at::ScalarType accumulator(const Tensor& tokens);  // double for double, float for the rest
const void* data(const OptionalTensor& tensor);    // null for none

// The tensor, or none, with its values in one block of memory.
OptionalTensor contiguous(const OptionalTensor& tensor);

// The passes for a tensor's device.
const Passes& passes_for(const Tensor& tokens);

// What the gate says of every image, and the affine map that applies it.
struct Gates {
  Tensor reduced, gate;  // (images, R), (images, C)
  Tensor factor;         // (images, C): scale * gate
  OptionalTensor shift;  // (images, C): factor * bias; none without bias
};

Gates run_gate(const Passes& passes, const DeviceScope& scope, const Tensor& tokens, const Tensor& mean,
               const Tensor& w_reduce, const OptionalTensor& offset, const Tensor& w_expand,
               const OptionalTensor& bias, const OptionalTensor& scale);

void run_affine(const Passes& passes, const DeviceScope& scope, const Tensor& tokens, const Tensor& factor,
                const OptionalTensor& shift, const OptionalTensor& residual, const Tensor& output);

void run_token_mean(const Passes& passes, const DeviceScope& scope, const Tensor& tokens, const Tensor& mean);

// Gradients that the gate's two products and its scale receive; d_y = factor * grad + shift.
struct GateGrads {
  Tensor d_expanded, d_reduced;  // (images, C), (images, R)
  Tensor factor, shift;          // (images, C)
  Tensor d_bias, d_scale;        // (images, C): the token sum of d_y; (images)
};

// `product` is what the affine map was applied to: y without its bias.
GateGrads run_gate_backward(const Passes& passes, const DeviceScope& scope, const Tensor& grad, const Tensor& product,
                            const Tensor& gate, const Tensor& reduced, const Tensor& w_reduce, const Tensor& w_expand,
                            const OptionalTensor& bias, const OptionalTensor& scale);

}  // namespace t2t
