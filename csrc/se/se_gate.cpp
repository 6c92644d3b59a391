// torch.ops.t2t_fast.se_gate: residual + scale * gate(token mean of x) * x, and its gradients.
#include "se_gate.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>

namespace t2t {

std::tuple<Tensor, Tensor, Tensor, Tensor> se_gate(const Tensor& x_, const Tensor& w_reduce_, const Tensor& w_expand,
                                                   const OptionalTensor& residual_, const OptionalTensor& scale_) {
  const DeviceScope scope(x_);
  const Passes& passes = passes_for(x_);
  const Tensor x = x_.contiguous(), w_reduce = w_reduce_.contiguous(), expand = w_expand.t().contiguous();
  const OptionalTensor residual = contiguous(residual_), scale = contiguous(scale_);
  const Tensor mean = at::empty({x.size(0), x.size(2)}, x.options().dtype(accumulator(x)));
  const Tensor reduced = at::empty({x.size(0), w_reduce.size(0)}, mean.options()), gate = at::empty_like(mean);
  run_token_mean(passes, scope, x, mean);
  const Gates gates =
      run_gate(passes, scope, mean, w_reduce, std::nullopt, expand, std::nullopt, scale, reduced, gate);
  const Tensor output = at::empty(x.sizes(), residual.has_value() ? residual->options() : x.options());
  run_affine(passes, scope, x, gates.factor, std::nullopt, residual, output);
  return {output, mean, reduced, gate};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> se_gate_backward(const Tensor& grad_, const Tensor& x_, const Tensor& mean,
                                                            const Tensor& reduced, const Tensor& gate,
                                                            const Tensor& w_reduce_, const Tensor& w_expand,
                                                            const OptionalTensor& scale_) {
  const DeviceScope scope(x_);
  const Passes& passes = passes_for(x_);
  const Tensor grad = grad_.contiguous(), x = x_.contiguous();
  const Tensor w_reduce = w_reduce_.contiguous(), expand = w_expand.t().contiguous();
  const OptionalTensor scale = contiguous(scale_);
  const Tensor d_expanded = at::empty_like(gate), d_reduced = at::empty_like(reduced), d_sum = at::empty_like(gate);
  const Tensor d_scale = at::empty({x.size(0)}, mean.options()), d_x = at::empty_like(x);
  const GateGrads grads = run_gate_backward(passes, scope, grad, x, gate, reduced, w_reduce, expand, std::nullopt,
                                            scale, d_expanded, d_reduced, d_sum, d_scale);
  run_affine(passes, scope, grad, grads.factor, grads.shift, std::nullopt, d_x);
  return {d_x, at::mm(d_reduced.t(), mean), at::mm(d_expanded.t(), reduced), d_scale};
}

}  // namespace t2t
