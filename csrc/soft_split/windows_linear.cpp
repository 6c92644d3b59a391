// torch.ops.t2t_fast.windows_linear: Linear(LayerNorm(windows of an image)) on the CPU, without gradients.
#include "windows_linear.h"

#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>

#include "../device.h"
#include "kernels.h"

namespace t2t {

using at::Tensor;

Tensor windows_linear(const Tensor& image, const Tensor& weight_, const std::optional<Tensor>& offset_,
                      at::IntArrayRef kernel_size, at::IntArrayRef stride, at::IntArrayRef padding, bool normed,
                      double eps) {
  TORCH_CHECK_TYPE(image.scalar_type() == at::kFloat || image.scalar_type() == at::kBFloat16,
                   "image has dtype ", image.scalar_type(), "; accepted: float32, bfloat16");
  const DeviceScope scope(image);
  const Tensor weight = weight_.to(at::kFloat).contiguous();
  const Tensor offset = offset_.has_value() ? offset_->to(at::kFloat).contiguous() : Tensor();
  WindowsLinear a{image.size(0), image.size(1), image.size(2), image.size(3), weight.size(0)};
  for (const int i : {0, 1}) {
    a.kernel[i] = kernel_size[i], a.step[i] = stride[i], a.padding[i] = padding[i];
    a.grid[i] = (image.size(2 + i) + 2 * padding[i] - kernel_size[i]) / stride[i] + 1;
  }
  TORCH_CHECK_VALUE(weight.size(1) == a.channels * a.kernel[0] * a.kernel[1], "weight has shape ", weight.sizes(),
                    ", which windows of ", image.sizes(), " do not fit");
  const Tensor output = at::empty({a.images, a.grid[0] * a.grid[1], a.outputs}, image.options());
  if (output.numel() == 0) return output;
  a.image = image.const_data_ptr();
  a.image_stride = image.stride(0), a.channel_stride = image.stride(1);
  a.row_stride = image.stride(2), a.column_stride = image.stride(3);
  a.weight = weight.const_data_ptr<float>();
  a.offset = offset.defined() ? offset.const_data_ptr<float>() : nullptr;
  a.normed = normed, a.eps = static_cast<float>(eps);
  a.output = output.data_ptr();
  image.scalar_type() == at::kBFloat16 ? windows_linear_bfloat16(a) : windows_linear_float32(a);
  return output;
}

}  // namespace t2t
