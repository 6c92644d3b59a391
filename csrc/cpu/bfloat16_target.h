// Include this first in a file for AVX512's bfloat16 matmuls, which a CPU with AVX512 may lack. Where the build can
// have them, T2T_BFLOAT16 is defined, and what T2T_BFLOAT16_BEGIN and T2T_BFLOAT16_END enclose is compiled for them.
// All of that must be in an unnamed namespace: headers that other files share, too, are included here, outside.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <c10/core/CPUAllocator.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#if defined(CPU_CAPABILITY_AVX512) && defined(__GNUC__) && !defined(__clang__)
#define T2T_BFLOAT16
#define T2T_BFLOAT16_BEGIN _Pragma("GCC push_options") _Pragma("GCC target(\"avx512bf16\")")
#define T2T_BFLOAT16_END _Pragma("GCC pop_options")
#endif

namespace t2t {

// Whether this build has bfloat16 matmuls, and this CPU.
inline bool has_bfloat16() {
#ifdef T2T_BFLOAT16
  return __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

}  // namespace t2t
