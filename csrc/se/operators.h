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

// `count` images of the tensor, or none.
OptionalTensor part(const OptionalTensor& all, int64_t first, int64_t count);

// The passes for a tensor's device.
const Passes& passes_for(const Tensor& tokens);

// The affine map that applies a gate.
struct Gates {
  Tensor factor;         // (images, C): scale * gate
  OptionalTensor shift;  // (images, C): factor * bias; none without bias
};

// Fills `reduced` (images, R) and `gate` (images, C); `expand` is w_expand transposed, contiguous.
Gates run_gate(const Passes& passes, const DeviceScope& scope, const Tensor& mean, const Tensor& w_reduce,
               const OptionalTensor& offset, const Tensor& expand, const OptionalTensor& bias,
               const OptionalTensor& scale, const Tensor& reduced, const Tensor& gate);

void run_affine(const Passes& passes, const DeviceScope& scope, const Tensor& tokens, const Tensor& factor,
                const OptionalTensor& shift, const OptionalTensor& residual, const Tensor& output);

void run_token_mean(const Passes& passes, const DeviceScope& scope, const Tensor& tokens, const Tensor& mean);

// d_y = factor * grad + shift.
struct GateGrads {
  Tensor factor, shift;  // (images, C)
};

// `product` is what the affine map was applied to: y without its bias. Fills the gradients that the gate's two matmuls
// receive, (images, C) and (images, R), the token sum of d_y, (images, C), and that of the scale, (images).
GateGrads run_gate_backward(const Passes& passes, const DeviceScope& scope, const Tensor& grad, const Tensor& product,
                            const Tensor& gate, const Tensor& reduced, const Tensor& w_reduce, const Tensor& expand,
                            const OptionalTensor& bias, const OptionalTensor& scale, const Tensor& d_expanded,
                            const Tensor& d_reduced, const Tensor& d_bias, const Tensor& d_scale);

}  // namespace t2t
