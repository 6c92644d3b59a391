#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace t2t {

// See module.cpp.
at::Tensor windows_linear(const at::Tensor& image, const at::Tensor& weight, const std::optional<at::Tensor>& offset,
                          at::IntArrayRef kernel_size, at::IntArrayRef stride, at::IntArrayRef padding, bool normed,
                          double eps);

}  // namespace t2t
