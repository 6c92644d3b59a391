// Windows of an image, their LayerNorm and a Linear, for float32 and bfloat16, on arrays without torch's tensors.
#pragma once

#include <cstdint>

namespace t2t {

struct WindowsLinear {
  int64_t images, channels, height, width, outputs;
  int64_t kernel[2], step[2], padding[2], grid[2];  // vertical and horizontal; grid: windows in each direction
  const void* image;                                // in the matmul's dtype
  int64_t image_stride, channel_stride, row_stride, column_stride;  // in elements
  const float* weight;  // (outputs, channels * kernel[0] * kernel[1]); where normed, each row's mean is 0
  const float* offset;  // (outputs), or null
  bool normed;          // without gamma and beta: weight and offset hold them
  float eps;
  void* output;  // (images, grid[0] * grid[1], outputs)
};

void windows_linear_float32(const WindowsLinear& arguments);
void windows_linear_bfloat16(const WindowsLinear& arguments);

}  // namespace t2t
