// t2t_fast._C: loading it registers the operators; build_info() tells what it was built with.
#include <pybind11/pybind11.h>
#include <torch/version.h>

#include "cpu/bfloat16_target.h"

namespace py = pybind11;

// Defined by setup.py on the command line.
#ifndef T2T_FAST_FLAGS
#define T2T_FAST_FLAGS ""
#endif
#ifndef T2T_FAST_CPU_CAPABILITY
#define T2T_FAST_CPU_CAPABILITY "DEFAULT"
#endif
#ifndef T2T_FAST_NVCC
#define T2T_FAST_NVCC ""
#endif
#ifndef T2T_FAST_ARCHITECTURES
#define T2T_FAST_ARCHITECTURES ""
#endif

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.def("build_info", [] {
    py::dict info;
    info["torch"] = TORCH_VERSION;
    info["compiler"] = __VERSION__;
    info["flags"] = T2T_FAST_FLAGS;
    info["cpu_capability"] = T2T_FAST_CPU_CAPABILITY;
    info["bfloat16"] = t2t::has_bfloat16();
    info["nvcc"] = T2T_FAST_NVCC;
    info["architectures"] = T2T_FAST_ARCHITECTURES;
    return info;
  }, "Compilers, flags, torch, CUDA architectures (empty: no CUDA), and whether there are bfloat16 matmuls.");
}
