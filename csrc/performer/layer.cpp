// torch.ops.t2t_fast.performer_layer: a Performer token layer behind its first Linear, and its gradients.
#include "layer.h"

#include <ATen/DimVector.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>
#include <c10/util/Exception.h>

#include <algorithm>

#include "../device.h"
#include "passes.h"

namespace t2t {

namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

Width width_of(const Tensor& tokens) {
  switch (tokens.scalar_type()) {
    case at::kFloat: return Width::Float;
    case at::kHalf: return Width::Half;
    case at::kBFloat16: return Width::BFloat16;
    default: TORCH_CHECK_TYPE(false, "kqv has dtype ", tokens.scalar_type(), "; accepted: float32, float16, bfloat16");
  }
}

// All in one block of memory, held here, and the passes' view of them.
struct Arguments {
  Arguments(const Tensor& kqv_, const OptionalTensor& proj_mask_, const OptionalTensor& mlp_mask_,
            at::ArrayRef<Tensor> weights_, double eps, double norm_eps)
      : kqv(kqv_.contiguous()) {
    if (proj_mask_.has_value()) proj_mask = proj_mask_->contiguous();
    if (mlp_mask_.has_value()) mlp_mask = mlp_mask_->contiguous();
    for (const Tensor& weight : weights_) weights.push_back(weight.to(at::kFloat).contiguous());
    const auto data = [&](size_t i) { return weights[i].const_data_ptr<float>(); };
    layer = {kqv.size(0), kqv.size(1), kqv.size(2) / 3, weights[0].size(0), weights[5].size(0), 1, width_of(kqv),
             static_cast<float>(eps), static_cast<float>(norm_eps), kqv.const_data_ptr(), data(0), data(2), data(3),
             data(4), data(5), data(6), data(7), data(8),
             proj_mask.defined() ? proj_mask.const_data_ptr() : nullptr,
             mlp_mask.defined() ? mlp_mask.const_data_ptr() : nullptr};
    // The parts are the same for any number of threads, and so are the sums.
    constexpr int64_t kTokensOfPart = 384, kParts = 8;
    layer.parts = std::clamp<int64_t>(layer.tokens / kTokensOfPart, 1, kParts);
  }

  const Tensor& proj_weight() const { return weights[1]; }
  Tensor floats(at::IntArrayRef sizes) const { return at::empty(sizes, kqv.options().dtype(at::kFloat)); }

  Tensor kqv, proj_mask, mlp_mask;
  std::vector<Tensor> weights;  // of torch.ops.t2t_fast.performer_layer, in its order
  TokenLayer layer;
};

constexpr int64_t kSlots = 32;  // shares of a sum over images, at most

// (images, m, E) times (E, E), image by image: a matmul of the library that shares its work among threads may add up in
// another order for another number of them.
Tensor multiply_each(const Tensor& left, const Tensor& right) {
  const Tensor out = at::empty({left.size(0), left.size(1), right.size(1)}, left.options());
  at::parallel_for(0, left.size(0), 1, [&](int64_t begin, int64_t end) {
    const DeviceScope scope(left);  // threads have dispatch keys of their own
    for (int64_t image = begin; image < end; ++image) {
      Tensor to = out.select(0, image);
      at::mm_out(to, left.select(0, image), right);
    }
  });
  return out;
}

// The sum over images of left^T right, (E, E), for (images, m, E) both.
Tensor multiply_and_sum(const Tensor& left, const Tensor& right) {
  const int64_t images = left.size(0), slots = std::min(kSlots, images);
  const Tensor sums = at::empty({slots, left.size(2), right.size(2)}, left.options());
  at::parallel_for(0, slots, 1, [&](int64_t begin, int64_t end) {
    const DeviceScope scope(left);
    for (int64_t slot = begin; slot < end; ++slot) {
      const int64_t first = images * slot / slots, count = images * (slot + 1) / slots - first;
      Tensor to = sums.select(0, slot);
      at::mm_out(to, left.narrow(0, first, count).flatten(0, 1).t(), right.narrow(0, first, count).flatten(0, 1));
    }
  });
  return sums.sum(0);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> performer_layer(const Tensor& kqv, const OptionalTensor& proj_mask,
                                                   const OptionalTensor& mlp_mask, const Tensor& w,
                                                   const Tensor& proj_weight, const Tensor& proj_bias,
                                                   const Tensor& norm_weight, const Tensor& norm_bias,
                                                   const Tensor& fc1_weight, const Tensor& fc1_bias,
                                                   const Tensor& fc2_weight, const Tensor& fc2_bias, double eps,
                                                   double norm_eps) {
  const DeviceScope scope(kqv);
  const Arguments arguments(kqv, proj_mask, mlp_mask,
                            {w, proj_weight, proj_bias, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight,
                             fc2_bias},
                            eps, norm_eps);
  const TokenLayer& layer = arguments.layer;
  const Tensor output = at::empty({layer.images, layer.tokens, layer.channels}, kqv.options());
  Tensor total = arguments.floats({layer.images, layer.parts, layer.features});
  Tensor summary = arguments.floats({layer.images, layer.parts, layer.features, layer.channels});
  summarize(layer, {total.data_ptr<float>(), summary.data_ptr<float>()});
  total = layer.parts == 1 ? total.squeeze(1) : total.sum(1);
  summary = layer.parts == 1 ? summary.squeeze(1) : summary.sum(1);
  const Tensor projected = multiply_each(summary, arguments.proj_weight().t());
  respond(layer, {total.const_data_ptr<float>(), projected.const_data_ptr<float>()}, output.data_ptr());
  return {output, total, summary};
}

std::vector<Tensor> performer_layer_backward(const Tensor& grad_, const Tensor& kqv, const OptionalTensor& proj_mask,
                                             const OptionalTensor& mlp_mask, const Tensor& w, const Tensor& proj_weight,
                                             const Tensor& proj_bias, const Tensor& norm_weight,
                                             const Tensor& norm_bias, const Tensor& fc1_weight, const Tensor& fc1_bias,
                                             const Tensor& fc2_weight, const Tensor& fc2_bias, const Tensor& total_,
                                             const Tensor& summary_, double eps, double norm_eps, bool needs_w) {
  const DeviceScope scope(kqv);
  const Arguments arguments(kqv, proj_mask, mlp_mask,
                            {w, proj_weight, proj_bias, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight,
                             fc2_bias},
                            eps, norm_eps);
  const TokenLayer& layer = arguments.layer;
  const int64_t images = layer.images, parts = layer.parts, features = layer.features, channels = layer.channels;
  const Tensor grad = grad_.to(kqv.scalar_type()).contiguous(), total = total_.contiguous();
  const Tensor summary = summary_.contiguous();
  const Tensor projected = multiply_each(summary, arguments.proj_weight().t());
  const Attended attended{total.const_data_ptr<float>(), projected.const_data_ptr<float>()};

  const int64_t slots = std::min(kSlots, images * parts);
  std::vector<Tensor> sums;
  for (const Tensor& weight : arguments.weights) {
    at::DimVector sizes(weight.sizes());
    sizes.insert(sizes.begin(), sums.size() == 1 ? 0 : slots);  // the projection's gradient is multiply_and_sum's
    sums.push_back(arguments.floats(sizes));
  }
  const auto data = [&](size_t i) { return sums[i].data_ptr<float>(); };
  const LayerGrads grads{slots, needs_w ? data(0) : nullptr, data(2), data(3), data(4), data(5), data(6), data(7),
                         data(8)};
  const Tensor d_kqv = at::empty(kqv.sizes(), kqv.options());
  const Tensor dy = arguments.floats({images, layer.tokens, channels});
  Tensor along = arguments.floats({images, parts, features});
  Tensor d_projected = arguments.floats({images, parts, features, channels});
  queries_backward(layer, attended,
                   {grad.const_data_ptr(), d_kqv.data_ptr(), dy.data_ptr<float>(), along.data_ptr<float>(),
                    d_projected.data_ptr<float>()},
                   grads);
  along = along.sum(1);
  d_projected = d_projected.sum(1);
  const Tensor d_summary = multiply_each(d_projected, arguments.proj_weight());
  keys_backward(layer,
                {dy.const_data_ptr<float>(), along.const_data_ptr<float>(), d_summary.const_data_ptr<float>(),
                 d_kqv.data_ptr()},
                grads);

  std::vector<Tensor> result{d_kqv};
  for (size_t i = 0; i < sums.size(); ++i) {
    if (i == 0 && !needs_w) result.push_back(arguments.floats({0}));
    else if (i == 1) result.push_back(multiply_and_sum(d_projected, summary));
    else result.push_back(sums[i].sum(0));
  }
  return result;
}

}  // namespace t2t
