// torch.ops.t2t_fast.se_mlp: residual + scale * gate * y with y = fc2(gelu(fc1(x))) and the gate that of y's token
// mean, and its gradients.
//
// The token mean commutes with fc2, so the gate needs only the token mean of the hidden layer, which the GELU's pass
// leaves behind, and w_reduce fc2_weight, one small matmul per call: it is known before fc2 runs, and what fc2 makes is
// read once, to be scaled. The same identity gives the gradient of w_reduce.
#include "se_mlp.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mv.h>
#include <ATen/ops/outer.h>
#include <ATen/ops/sum.h>

#include "../chunks.h"
#include "../products.h"

namespace t2t {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> se_mlp(
    const Tensor& x_, const Tensor& fc1_weight, const OptionalTensor& fc1_bias_, const Tensor& fc2_weight,
    const OptionalTensor& fc2_bias_, const Tensor& w_reduce, const Tensor& w_expand, const OptionalTensor& residual_,
    const OptionalTensor& scale_, bool differentiate) {
  const DeviceScope scope(x_);
  const Passes& passes = passes_for(x_);
  const Tensor x = x_.contiguous();
  const OptionalTensor fc1_bias = contiguous(fc1_bias_), fc2_bias = contiguous(fc2_bias_),
                       residual = contiguous(residual_), scale = contiguous(scale_);
  const int64_t images = x.size(0), tokens = x.size(1), wide = fc1_weight.size(0), channels = fc2_weight.size(0);
  const auto acc = accumulator(x);

  // The gate sees the hidden mean through w_reduce fc2_weight; for a few images, through one after the other.
  const bool few = images < w_reduce.size(0);
  const Tensor exact_fc2 = fc2_weight.to(acc);
  const Tensor to_reduced = few ? w_reduce.contiguous() : at::mm(w_reduce, exact_fc2).contiguous();
  const Tensor expand = w_expand.t().contiguous();
  const OptionalTensor offset = fc2_bias ? OptionalTensor(at::mv(w_reduce, *fc2_bias)) : std::nullopt;

  const Chunks chunks(x, tokens * wide * x.element_size());
  const Tensor output = at::empty({images, tokens, channels}, residual ? residual->options() : x.options());
  const int64_t kept = differentiate ? images : 0;
  const Tensor hidden = at::empty({kept, tokens, wide}, x.options());
  const Tensor product = at::empty({kept, tokens, channels}, x.options());
  const Tensor mean = at::empty({images, wide}, x.options().dtype(acc));
  const Tensor reduced = at::empty({images, w_reduce.size(0)}, mean.options());
  const Tensor gate = at::empty({images, channels}, mean.options());

  chunks.for_each(x, [&](int64_t, bool, int64_t first, int64_t count) {
    const auto of_chunk = [&](const Tensor& all) { return all.narrow(0, first, count); };
    const auto kept_part = [&](const Tensor& all) { return differentiate ? OptionalTensor(of_chunk(all)) : std::nullopt; };
    const Tensor mean_part = of_chunk(mean), output_part = of_chunk(output);
    const Tensor before = multiply(of_chunk(x), fc1_weight, kept_part(hidden));
    const Tensor active = differentiate ? at::empty_like(before) : before;
    passes.activate({extent_of(before), type_of(x), before.const_data_ptr(), data(fc1_bias), active.data_ptr(),
                     mean_part.data_ptr()},
                    scope.stream());
    const Tensor seen = few ? at::mm(mean_part, exact_fc2.t()) : mean_part;
    const Gates gates = run_gate(passes, scope, seen, to_reduced, offset, expand, fc2_bias,
                                 part(scale, first, count), of_chunk(reduced), of_chunk(gate));
    const bool in_place = !differentiate && output.scalar_type() == x.scalar_type() && !x.is_cpu();
    const Tensor y = multiply(active, fc2_weight, in_place ? OptionalTensor(output_part) : kept_part(product));
    run_affine(passes, scope, y, gates.factor, gates.shift, part(residual, first, count), output_part);
  });
  return {output, hidden, product, mean, reduced, gate};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> se_mlp_backward(
    const Tensor& grad_, const Tensor& x_, const Tensor& fc1_weight, const OptionalTensor& fc1_bias_,
    const Tensor& fc2_weight, const OptionalTensor& fc2_bias_, const Tensor& w_reduce_, const Tensor& w_expand,
    const OptionalTensor& scale_, const Tensor& hidden, const Tensor& product, const Tensor& mean,
    const Tensor& reduced, const Tensor& gate) {
  const DeviceScope scope(x_);
  const Passes& passes = passes_for(x_);
  const Tensor grad = grad_.contiguous(), x = x_.contiguous(), w_reduce = w_reduce_.contiguous();
  const OptionalTensor fc1_bias = contiguous(fc1_bias_), fc2_bias = contiguous(fc2_bias_), scale = contiguous(scale_);

  // 16-bit matmuls over all rows at once: sums of chunks would be rounded in between.
  const Chunks chunks(x, hidden.size(1) * (2 * hidden.size(2) + product.size(2)) * x.element_size(),
                      x.element_size() == 2);
  const Tensor d_x = at::empty_like(x), d_fc1_bias = at::empty_like(mean), d_fc2_bias = at::empty_like(gate);
  const Tensor d_expanded = at::empty_like(gate), d_reduced = at::empty_like(reduced);
  const Tensor d_scale = at::empty({x.size(0)}, mean.options());
  const Tensor d_fc1 = at::empty({chunks.slots, fc1_weight.size(0), fc1_weight.size(1)}, x.options());
  const Tensor d_fc2 = at::empty({chunks.slots, fc2_weight.size(0), fc2_weight.size(1)}, x.options());
  const Tensor expand = w_expand.t().contiguous();

  chunks.for_each(x, [&](int64_t slot, bool fresh, int64_t first, int64_t count) {
    const auto of_chunk = [&](const Tensor& all) { return all.narrow(0, first, count); };
    const Tensor grad_part = of_chunk(grad), hidden_part = of_chunk(hidden);
    const Tensor d_y = at::empty_like(of_chunk(product)), active = at::empty_like(hidden_part);
    const GateGrads grads = run_gate_backward(
        passes, scope, grad_part, of_chunk(product), of_chunk(gate), of_chunk(reduced), w_reduce, expand, fc2_bias,
        part(scale, first, count), of_chunk(d_expanded), of_chunk(d_reduced), of_chunk(d_fc2_bias), of_chunk(d_scale));
    run_affine(passes, scope, grad_part, grads.factor, grads.shift, std::nullopt, d_y);
    const Tensor d_hidden = multiply(d_y, fc2_weight.t(), std::nullopt);
    passes.activate_backward({extent_of(hidden_part), type_of(x), hidden_part.const_data_ptr(), data(fc1_bias),
                              d_hidden.const_data_ptr(), d_hidden.data_ptr(), active.data_ptr(),
                              of_chunk(d_fc1_bias).data_ptr()},
                             scope.stream());
    multiply_transposed(d_fc2[slot], d_y, active, fresh);
    multiply(d_hidden, fc1_weight.t(), of_chunk(d_x));
    multiply_transposed(d_fc1[slot], d_hidden, of_chunk(x), fresh);
  });

  Tensor d_w_reduce = at::mm(at::mm(d_reduced.t(), mean), fc2_weight.to(mean.scalar_type()).t());
  if (fc2_bias) d_w_reduce.add_(at::outer(at::sum(d_reduced, 0), *fc2_bias));
  const auto total = [](const Tensor& of_slots) {
    return of_slots.size(0) == 1 ? of_slots.squeeze(0) : at::sum(of_slots, 0);
  };
  return {d_x,
          total(d_fc1),
          at::sum(d_fc1_bias, 0),
          total(d_fc2),
          at::sum(d_fc2_bias, 0),
          d_w_reduce,
          at::mm(d_expanded.t(), reduced),
          d_scale};
}

}  // namespace t2t
