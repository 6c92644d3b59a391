#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>
#include <vector>

namespace t2t {

// See module.cpp.
std::tuple<at::Tensor, at::Tensor, at::Tensor> performer_layer(
    const at::Tensor& kqv, const std::optional<at::Tensor>& proj_mask, const std::optional<at::Tensor>& mlp_mask,
    const at::Tensor& w, const at::Tensor& proj_weight, const at::Tensor& proj_bias, const at::Tensor& norm_weight,
    const at::Tensor& norm_bias, const at::Tensor& fc1_weight, const at::Tensor& fc1_bias,
    const at::Tensor& fc2_weight, const at::Tensor& fc2_bias, double eps, double norm_eps);

// Gradients of kqv and of the nine weights; that of w is empty unless it is needed.
std::vector<at::Tensor> performer_layer_backward(
    const at::Tensor& grad, const at::Tensor& kqv, const std::optional<at::Tensor>& proj_mask,
    const std::optional<at::Tensor>& mlp_mask, const at::Tensor& w, const at::Tensor& proj_weight,
    const at::Tensor& proj_bias, const at::Tensor& norm_weight, const at::Tensor& norm_bias,
    const at::Tensor& fc1_weight, const at::Tensor& fc1_bias, const at::Tensor& fc2_weight, const at::Tensor& fc2_bias,
    const at::Tensor& total, const at::Tensor& summary, double eps, double norm_eps, bool needs_w);

}  // namespace t2t
