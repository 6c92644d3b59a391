#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

namespace t2t {

// See module.cpp.
std::tuple<at::Tensor, at::Tensor> attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                             double scale, bool differentiate);
std::tuple<at::Tensor, at::Tensor, at::Tensor> attention_backward(const at::Tensor& grad, const at::Tensor& q,
                                                                  const at::Tensor& k, const at::Tensor& v,
                                                                  const at::Tensor& output, const at::Tensor& lse,
                                                                  double scale);

}  // namespace t2t
