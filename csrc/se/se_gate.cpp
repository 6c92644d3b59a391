// torch.ops.t2t_fast.se_gate: residual + scale * gate(token mean of x) * x, and its gradients.
#include "se_gate.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>

#include "../chunks.h"

namespace t2t {

namespace {

int64_t bytes_per_image(const Tensor& tokens) { return tokens.size(1) * tokens.size(2) * tokens.element_size(); }

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> se_gate(const Tensor& x_, const Tensor& w_reduce_, const Tensor& w_expand,
                                                   const OptionalTensor& residual_, const OptionalTensor& scale_) {
  const DeviceScope scope(x_);
  const Passes& passes = passes_for(x_);
  const Tensor x = x_.contiguous(), w_reduce = w_reduce_.contiguous(), expand = w_expand.t().contiguous();
  const OptionalTensor residual = contiguous(residual_), scale = contiguous(scale_);
  const Tensor mean = at::empty({x.size(0), x.size(2)}, x.options().dtype(accumulator(x)));
  const Tensor reduced = at::empty({x.size(0), w_reduce.size(0)}, mean.options()), gate = at::empty_like(mean);
  const Tensor output = at::empty(x.sizes(), residual.has_value() ? residual->options() : x.options());
  Chunks(x, bytes_per_image(x)).for_each(x, [&](int64_t, bool, int64_t first, int64_t count) {
    const auto of_chunk = [&](const Tensor& all) { return all.narrow(0, first, count); };
    const Tensor x_part = of_chunk(x), mean_part = of_chunk(mean);
    run_token_mean(passes, scope, x_part, mean_part);
    const Gates gates = run_gate(passes, scope, mean_part, w_reduce, std::nullopt, expand, std::nullopt,
                                 part(scale, first, count), of_chunk(reduced), of_chunk(gate));
    run_affine(passes, scope, x_part, gates.factor, std::nullopt, part(residual, first, count), of_chunk(output));
  });
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
  Chunks(x, 2 * bytes_per_image(x)).for_each(x, [&](int64_t, bool, int64_t first, int64_t count) {
    const auto of_chunk = [&](const Tensor& all) { return all.narrow(0, first, count); };
    const Tensor grad_part = of_chunk(grad);
    const GateGrads grads = run_gate_backward(
        passes, scope, grad_part, of_chunk(x), of_chunk(gate), of_chunk(reduced), w_reduce, expand, std::nullopt,
        part(scale, first, count), of_chunk(d_expanded), of_chunk(d_reduced), of_chunk(d_sum), of_chunk(d_scale));
    run_affine(passes, scope, grad_part, grads.factor, grads.shift, std::nullopt, of_chunk(d_x));
  });
  return {d_x, at::mm(d_reduced.t(), mean), at::mm(d_expanded.t(), reduced), d_scale};
}

}  // namespace t2t
