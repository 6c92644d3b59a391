#include <c10/util/Exception.h>

#include "operators.h"

namespace t2t {

const Passes& passes_for(const Tensor& tokens) {
  if (tokens.is_cpu()) return cpu_passes();
#ifdef T2T_FAST_CUDA
  if (tokens.is_cuda()) return cuda_passes();
#endif
  TORCH_CHECK(false, "this build of the extension has no kernels for ", tokens.device());
}

}  // namespace t2t
