// The large matmuls, which belong to the library: oneDNN for float32 on the CPU, ATen elsewhere.
// PyTorch gives float32 to MKL, which took 1.15 times and twice the time on the two AMD CPUs it was measured on.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace t2t {

// tokens weight^T for (images, tokens, C) and (out, C); in `out` if it is given.
at::Tensor multiply(const at::Tensor& tokens, const at::Tensor& weight, const std::optional<at::Tensor>& out);

// out = a^T b over all rows of (images, tokens, .), or out += it.
void multiply_transposed(at::Tensor out, const at::Tensor& a, const at::Tensor& b, bool fresh);

}  // namespace t2t
