#pragma once

#include <tuple>

#include "operators.h"

namespace t2t {

// Schemas and meanings: module.cpp.
std::tuple<Tensor, Tensor, Tensor, Tensor> se_gate(const Tensor& x, const Tensor& w_reduce, const Tensor& w_expand,
                                                   const OptionalTensor& residual, const OptionalTensor& scale);

std::tuple<Tensor, Tensor, Tensor, Tensor> se_gate_backward(const Tensor& grad, const Tensor& x, const Tensor& mean,
                                                            const Tensor& reduced, const Tensor& gate,
                                                            const Tensor& w_reduce, const Tensor& w_expand,
                                                            const OptionalTensor& scale);

}  // namespace t2t
