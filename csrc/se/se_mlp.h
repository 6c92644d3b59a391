#pragma once

#include <tuple>

#include "operators.h"

namespace t2t {

// Schemas and meanings: module.cpp.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> se_mlp(
    const Tensor& x, const Tensor& fc1_weight, const OptionalTensor& fc1_bias, const Tensor& fc2_weight,
    const OptionalTensor& fc2_bias, const Tensor& w_reduce, const Tensor& w_expand, const OptionalTensor& residual,
    const OptionalTensor& scale, bool differentiate);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> se_mlp_backward(
    const Tensor& grad, const Tensor& x, const Tensor& fc1_weight, const OptionalTensor& fc1_bias,
    const Tensor& fc2_weight, const OptionalTensor& fc2_bias, const Tensor& w_reduce, const Tensor& w_expand,
    const OptionalTensor& scale, const Tensor& hidden, const Tensor& product, const Tensor& mean,
    const Tensor& reduced, const Tensor& gate);

}  // namespace t2t
