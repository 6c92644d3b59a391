// torch.ops.t2t_fast.se_mlp: residual + scale * gate * y with y = fc2(gelu(fc1(x))) and the gate that of y's token
// mean, and its gradients.
//
// The token mean commutes with fc2, so the gate needs only the token mean of the hidden layer, which the GELU's pass
// leaves behind, and w_reduce fc2_weight, one small product per call: it is known before fc2 runs, and what fc2 makes
// is read once, to be scaled. The same identity gives the gradient of w_reduce.
#include "se_mlp.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mv.h>
#include <ATen/ops/outer.h>
#include <ATen/ops/sum.h>

#include <algorithm>

namespace t2t {

namespace {

// Hidden values that stay in a CPU's cache from one product to the next.
constexpr int64_t kChunkBytes = 1 << 20;

int64_t images_per_chunk(const Tensor& x, int64_t hidden_channels) {
  if (!x.is_cpu()) return x.size(0);
  const int64_t bytes = x.size(1) * hidden_channels * x.element_size();
  return std::max<int64_t>(1, kChunkBytes / std::max<int64_t>(1, bytes));
}

Tensor rows(const Tensor& tokens) { return tokens.flatten(0, 1); }

// out = tokens weight^T
void multiply(Tensor out, const Tensor& tokens, const Tensor& weight) {
  Tensor out_rows = rows(out);
  at::mm_out(out_rows, rows(tokens), weight.t());
}

}  // namespace

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

  const Tensor to_reduced = at::mm(w_reduce, fc2_weight.to(acc)).contiguous();
  const OptionalTensor offset = fc2_bias ? OptionalTensor(at::mv(w_reduce, *fc2_bias)) : std::nullopt;

  const int64_t chunk = std::min(images_per_chunk(x, wide), images);
  const Tensor output = at::empty({images, tokens, channels}, residual ? residual->options() : x.options());
  const int64_t kept = differentiate ? images : 0;
  const Tensor hidden = at::empty({kept, tokens, wide}, x.options());
  const Tensor product = at::empty({kept, tokens, channels}, x.options());
  const Tensor mean = at::empty({images, wide}, x.options().dtype(acc));
  const Tensor activated = at::empty({chunk, tokens, wide}, x.options());
  const bool needs_room = !differentiate && output.scalar_type() != x.scalar_type();
  const Tensor room = at::empty({needs_room ? chunk : 0, tokens, channels}, x.options());
  const Tensor reduced = at::empty({images, w_reduce.size(0)}, mean.options());
  const Tensor gate = at::empty({images, channels}, mean.options());

  for (int64_t first = 0; first < images; first += chunk) {
    const int64_t count = std::min(chunk, images - first);
    const auto part = [&](const Tensor& all) { return all.narrow(0, first, count); };
    const auto optional_part = [&](const OptionalTensor& all) {
      return all ? OptionalTensor(part(*all)) : std::nullopt;
    };
    const Tensor active = activated.narrow(0, 0, count), before = differentiate ? part(hidden) : active;
    const Tensor mean_part = part(mean), output_part = part(output);
    multiply(before, part(x), fc1_weight);
    passes.activate({extent_of(before), type_of(x), before.const_data_ptr(), data(fc1_bias), active.data_ptr(),
                     mean_part.data_ptr()},
                    scope.stream());
    const Gates gates = run_gate(passes, scope, x, mean_part, to_reduced, offset, w_expand, fc2_bias,
                                 optional_part(scale));
    const Tensor y = differentiate ? part(product) : needs_room ? room.narrow(0, 0, count) : output_part;
    multiply(y, active, fc2_weight);
    run_affine(passes, scope, y, gates.factor, gates.shift, optional_part(residual), output_part);
    if (differentiate) {
      part(reduced).copy_(gates.reduced);
      part(gate).copy_(gates.gate);
    }
  }
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

  const GateGrads grads =
      run_gate_backward(passes, scope, grad, product, gate, reduced, w_reduce, w_expand, fc2_bias, scale);
  const Tensor d_w_expand = at::mm(grads.d_expanded.t(), reduced);
  Tensor d_w_reduce = at::mm(at::mm(grads.d_reduced.t(), mean), fc2_weight.to(mean.scalar_type()).t());
  if (fc2_bias) d_w_reduce.add_(at::outer(at::sum(grads.d_reduced, 0), *fc2_bias));

  const Tensor d_y = at::empty_like(product), d_hidden = at::empty_like(hidden), active = at::empty_like(hidden);
  const Tensor d_bias = at::empty_like(mean), d_x = at::empty_like(x);
  run_affine(passes, scope, grad, grads.factor, grads.shift, std::nullopt, d_y);
  multiply(d_hidden, d_y, fc2_weight.t());
  passes.activate_backward({extent_of(hidden), type_of(x), hidden.const_data_ptr(), data(fc1_bias),
                            d_hidden.const_data_ptr(), d_hidden.data_ptr(), active.data_ptr(), d_bias.data_ptr()},
                           scope.stream());
  multiply(d_x, d_hidden, fc1_weight.t());
  return {d_x,
          at::mm(rows(d_hidden).t(), rows(x)),
          at::sum(d_bias, 0),
          at::mm(rows(d_y).t(), rows(active)),
          at::sum(grads.d_bias, 0),
          d_w_reduce,
          d_w_expand,
          grads.d_scale};
}

}  // namespace t2t
