#include "../cpu/bfloat16_target.h"
#include "kernels.h"

#ifdef T2T_BFLOAT16
T2T_BFLOAT16_BEGIN
#include "../cpu/bfloat16.h"
#include "backward.h"
#include "forward.h"

namespace t2t {

void attend_bfloat16(const Attend& arguments) { Forward<BFloat16>(arguments).run(); }

void attend_backward_bfloat16(const AttendBackward& arguments) { Backward<BFloat16>(arguments).run(); }

}  // namespace t2t
T2T_BFLOAT16_END
#else
namespace t2t {

void attend_bfloat16(const Attend&) { TORCH_CHECK(false, "this build of the extension has no bfloat16 matmuls"); }

void attend_backward_bfloat16(const AttendBackward&) {
  TORCH_CHECK(false, "this build of the extension has no bfloat16 matmuls");
}

}  // namespace t2t
#endif
