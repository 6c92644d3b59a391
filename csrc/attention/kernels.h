// Softmax attention's loops, for float32 and bfloat16, on arrays without torch's tensors.
#pragma once

#include <cstdint>

namespace t2t {

// (images, heads, tokens, channels), the channels of a token side by side. Strides count elements.
struct HeadTokens {
  void* data;
  int64_t image_stride, head_stride, token_stride;
};

struct Sizes {
  int64_t images, heads, queries_count, keys_count, channels;  // none is zero
  float scale;
};

// output = softmax(scale queries keys^T) values.
struct Attend : Sizes {
  HeadTokens queries, keys, values, output;
  float* lse;  // (images, heads, queries_count), or null: log of the sum of exp(scale queries keys^T)
};

// The gradients of queries, keys and values, from that of the output.
struct AttendBackward : Sizes {
  HeadTokens queries, keys, values, output, grad, d_queries, d_keys, d_values;
  const float* lse;
  float* partial;  // (parts, images, heads, queries_count, channels), or null if there is one part
  int64_t parts;   // shares of the keys, which are worked on at the same time
};

void attend_float32(const Attend& arguments);
void attend_bfloat16(const Attend& arguments);
void attend_backward_float32(const AttendBackward& arguments);
void attend_backward_bfloat16(const AttendBackward& arguments);

}  // namespace t2t
