#include "../cpu/bfloat16_target.h"
#include "kernels.h"

#ifdef T2T_BFLOAT16
T2T_BFLOAT16_BEGIN
#include "../cpu/bfloat16.h"
#include "windows.h"

namespace t2t {

void windows_linear_bfloat16(const WindowsLinear& arguments) { Windows<BFloat16>(arguments).run(); }

}  // namespace t2t
T2T_BFLOAT16_END
#else
namespace t2t {

void windows_linear_bfloat16(const WindowsLinear&) {
  TORCH_CHECK(false, "this build of the extension has no bfloat16 matmuls");
}

}  // namespace t2t
#endif
