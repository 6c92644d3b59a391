// In place of csrc/se/passes_for.cpp: the CUDA passes, emulated, for tensors of the CPU; or the CPU's own.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "../../csrc/se/operators.h"
#include "cuda_emulation.h"

namespace t2t {

static bool emulate = true;

const Passes& passes_for(const Tensor&) { return emulate ? cuda_passes() : cpu_passes(); }

}  // namespace t2t

TORCH_LIBRARY_FRAGMENT(t2t_fast_emulated, library) {
  library.def("emulate(bool on) -> ()", [](bool on) { t2t::emulate = on; });
  library.def("order(int order) -> ()", [](int64_t order) { emulation::order() = int(order); });
}
