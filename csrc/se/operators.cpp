#include "operators.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/util/Exception.h>

namespace t2t {

Type type_of(const Tensor& tokens) {
  switch (tokens.scalar_type()) {
    case at::kFloat: return Type::Float;
    case at::kDouble: return Type::Double;
    case at::kHalf: return Type::Half;
    case at::kBFloat16: return Type::BFloat16;
    default: TORCH_CHECK_TYPE(false, "tokens have dtype ", tokens.scalar_type(), "; accepted: floating-point dtypes");
  }
}

Extent extent_of(const Tensor& tokens) {
  return {tokens.size(0), tokens.size(1), tokens.size(2)};
}

at::ScalarType accumulator(const Tensor& tokens) {
  return tokens.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

const void* data(const OptionalTensor& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr() : nullptr;
}

OptionalTensor contiguous(const OptionalTensor& tensor) {
  return tensor.has_value() ? OptionalTensor(tensor->contiguous()) : std::nullopt;
}

OptionalTensor part(const OptionalTensor& all, int64_t first, int64_t count) {
  return all.has_value() ? OptionalTensor(all->narrow(0, first, count)) : std::nullopt;
}

Gates run_gate(const Passes& passes, const DeviceScope& scope, const Tensor& mean, const Tensor& w_reduce,
               const OptionalTensor& offset, const Tensor& expand, const OptionalTensor& bias,
               const OptionalTensor& scale, const Tensor& reduced, const Tensor& gate) {
  Gates gates{at::empty_like(gate), std::nullopt};
  if (bias.has_value()) gates.shift = at::empty_like(gate);
  passes.gate({mean.size(0), mean.size(1), reduced.size(1), gate.size(1), type_of(mean), mean.const_data_ptr(),
               w_reduce.const_data_ptr(), data(offset), expand.const_data_ptr(), data(bias), data(scale),
               reduced.data_ptr(), gate.data_ptr(), gates.factor.data_ptr(),
               bias.has_value() ? gates.shift->data_ptr() : nullptr},
              scope.stream());
  return gates;
}

void run_affine(const Passes& passes, const DeviceScope& scope, const Tensor& tokens, const Tensor& factor,
                const OptionalTensor& shift, const OptionalTensor& residual, const Tensor& output) {
  passes.affine({extent_of(tokens), type_of(tokens), type_of(output), tokens.const_data_ptr(), factor.const_data_ptr(),
                 data(shift), data(residual), output.data_ptr()},
                scope.stream());
}

void run_token_mean(const Passes& passes, const DeviceScope& scope, const Tensor& tokens, const Tensor& mean) {
  passes.token_mean({extent_of(tokens), type_of(tokens), tokens.const_data_ptr(), mean.data_ptr()}, scope.stream());
}

GateGrads run_gate_backward(const Passes& passes, const DeviceScope& scope, const Tensor& grad, const Tensor& product,
                            const Tensor& gate, const Tensor& reduced, const Tensor& w_reduce, const Tensor& expand,
                            const OptionalTensor& bias, const OptionalTensor& scale, const Tensor& d_expanded,
                            const Tensor& d_reduced, const Tensor& d_bias, const Tensor& d_scale) {
  const Extent extent = extent_of(grad);
  const Tensor sum = at::empty_like(gate), dot = at::empty_like(gate);
  passes.reduce_grad({extent, type_of(grad), type_of(product), grad.const_data_ptr(), product.const_data_ptr(),
                      sum.data_ptr(), dot.data_ptr()},
                     scope.stream());
  GateGrads grads{at::empty_like(gate), at::empty_like(gate)};
  passes.gate_backward({extent.images, extent.tokens, reduced.size(1), extent.channels, type_of(gate),
                        sum.const_data_ptr(), dot.const_data_ptr(), gate.const_data_ptr(), reduced.const_data_ptr(),
                        w_reduce.const_data_ptr(), expand.const_data_ptr(), data(bias), data(scale),
                        d_expanded.data_ptr(), d_reduced.data_ptr(), grads.factor.data_ptr(), grads.shift.data_ptr(),
                        d_bias.data_ptr(), d_scale.data_ptr()},
                       scope.stream());
  return grads;
}

}  // namespace t2t
