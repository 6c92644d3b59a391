#include "products.h"

#include <ATen/core/List.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>

#include <string_view>

namespace t2t {

namespace {

using at::Tensor;

// torch.ops.mkldnn._linear_pointwise, which torch.compile's CPU backend uses; null in a torch without oneDNN.
using OneDnnLinear = Tensor(const Tensor&, const Tensor&, const std::optional<Tensor>&, std::string_view,
                            c10::List<std::optional<at::Scalar>>, std::optional<std::string_view>);

const c10::OperatorHandle* onednn_linear() {
#if defined(__x86_64__) || defined(_M_X64)
  static const auto handle = c10::Dispatcher::singleton().findSchema({"mkldnn::_linear_pointwise", ""});
  static const bool usable = handle.has_value() && handle->hasKernelForDispatchKey(c10::DispatchKey::CPU);
  return usable ? &*handle : nullptr;
#else
  return nullptr;
#endif
}

bool takes_onednn(const Tensor& a) {
  return a.is_cpu() && a.scalar_type() == at::kFloat && a.numel() > 0 && onednn_linear() != nullptr;
}

Tensor linear(const Tensor& rows, const Tensor& weight) {
  const c10::List<std::optional<at::Scalar>> no_scalars;
  return onednn_linear()->typed<OneDnnLinear>().call(rows, weight, std::nullopt, "none", no_scalars, "");
}

Tensor rows(const Tensor& tokens) { return tokens.flatten(0, 1); }

}  // namespace

Tensor multiply(const Tensor& tokens, const Tensor& weight, const std::optional<Tensor>& out) {
  if (takes_onednn(tokens) && weight.numel() > 0) {
    const Tensor made = linear(tokens, weight);
    return out.has_value() ? out->copy_(made) : made;
  }
  Tensor to = out.has_value() ? *out : at::empty({tokens.size(0), tokens.size(1), weight.size(0)}, tokens.options());
  Tensor to_rows = rows(to);
  at::mm_out(to_rows, rows(tokens), weight.t());
  return to;
}

void multiply_transposed(Tensor out, const Tensor& a, const Tensor& b, bool fresh) {
  if (takes_onednn(a)) {
    const Tensor made = linear(rows(a).t(), rows(b).t());
    fresh ? out.copy_(made) : out.add_(made);
  } else if (fresh) {
    at::mm_out(out, rows(a).t(), rows(b));
  } else {
    at::addmm_out(out, out, rows(a).t(), rows(b));
  }
}

}  // namespace t2t
