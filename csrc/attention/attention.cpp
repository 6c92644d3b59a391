// torch.ops.t2t_fast.attention: softmax(scale q k^T) v on the CPU.
#include "attention.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zero.h>
#include <c10/util/Exception.h>

#include <algorithm>

#include "../device.h"
#include "kernels.h"

namespace t2t {

namespace {

using at::Tensor;

// With the channels of a token side by side.
Tensor by_token(const Tensor& tokens) { return tokens.stride(3) == 1 ? tokens : tokens.contiguous(); }

HeadTokens head_tokens(const Tensor& tokens) {
  return {tokens.data_ptr(), tokens.stride(0), tokens.stride(1), tokens.stride(2)};
}

// (images, heads, tokens, channels) with a token's heads side by side, as the projections around the attention want.
Tensor empty_like(const Tensor& tokens) {
  return at::empty({tokens.size(0), tokens.size(2), tokens.size(1), tokens.size(3)}, tokens.options()).transpose(1, 2);
}

Sizes sizes(const Tensor& q, const Tensor& k, double scale) {
  return {q.size(0), q.size(1), q.size(2), k.size(2), q.size(3), static_cast<float>(scale)};
}

void check(const Tensor& q, const Tensor& k, const Tensor& v) {
  const auto dtype = q.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kBFloat16,
                   "q has dtype ", dtype, "; accepted: float32, bfloat16");
  TORCH_CHECK_TYPE(k.scalar_type() == dtype && v.scalar_type() == dtype, "q, k and v differ in dtype");
  TORCH_CHECK_VALUE(q.dim() == 4 && k.dim() == 4 && k.sizes() == v.sizes() && q.size(0) == k.size(0) &&
                        q.size(1) == k.size(1) && q.size(3) == k.size(3),
                    "q, k and v have shapes ", q.sizes(), ", ", k.sizes(), ", ", v.sizes(), ", which do not fit");
}

}  // namespace

std::tuple<Tensor, Tensor> attention(const Tensor& q_, const Tensor& k_, const Tensor& v_, double scale,
                                     bool differentiate) {
  check(q_, k_, v_);
  const DeviceScope scope(q_);
  const Tensor q = by_token(q_), k = by_token(k_), v = by_token(v_), output = empty_like(q);
  const Tensor lse = at::empty({differentiate ? q.size(0) : 0, q.size(1), q.size(2)}, q.options().dtype(at::kFloat));
  if (q.numel() == 0 || k.numel() == 0) return {output.zero_(), lse.zero_()};
  const Attend arguments{sizes(q, k, scale), head_tokens(q), head_tokens(k), head_tokens(v), head_tokens(output),
                         differentiate ? lse.data_ptr<float>() : nullptr};
  q.scalar_type() == at::kBFloat16 ? attend_bfloat16(arguments) : attend_float32(arguments);
  return {output, lse};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(const Tensor& grad_, const Tensor& q_, const Tensor& k_,
                                                      const Tensor& v_, const Tensor& output_, const Tensor& lse_,
                                                      double scale) {
  check(q_, k_, v_);
  const DeviceScope scope(q_);
  TORCH_CHECK_VALUE(lse_.numel() == q_.size(0) * q_.size(1) * q_.size(2),
                    "lse has shape ", lse_.sizes(), ": the forward pass was told not to differentiate");
  const Tensor q = by_token(q_), k = by_token(k_), v = by_token(v_), output = by_token(output_.to(q.scalar_type()));
  const Tensor grad = by_token(grad_.to(q.scalar_type())), lse = lse_.to(at::kFloat).contiguous();
  const Tensor dq = empty_like(q), dk = empty_like(k), dv = empty_like(v);
  if (q.numel() == 0 || k.numel() == 0) return {dq.zero_(), dk.zero_(), dv.zero_()};
  // Few heads share their keys among threads. The parts are the same for any number of threads, and so are the sums.
  constexpr int64_t kTasks = 8, kKeysOfPart = 192;
  const int64_t most = std::max<int64_t>(1, kTasks / (q.size(0) * q.size(1)));
  const int64_t parts = std::clamp<int64_t>(k.size(2) / kKeysOfPart, 1, most);
  const Tensor partial = at::empty({parts > 1 ? parts : 0, q.numel()}, lse.options());
  const AttendBackward arguments{sizes(q, k, scale), head_tokens(q), head_tokens(k), head_tokens(v),
                                 head_tokens(output), head_tokens(grad), head_tokens(dq), head_tokens(dk),
                                 head_tokens(dv), lse.const_data_ptr<float>(), partial.data_ptr<float>(), parts};
  q.scalar_type() == at::kBFloat16 ? attend_backward_bfloat16(arguments) : attend_backward_float32(arguments);
  return {dq, dk, dv};
}

}  // namespace t2t
