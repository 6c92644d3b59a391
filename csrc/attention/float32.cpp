#include "backward.h"
#include "forward.h"

namespace t2t {

void attend_float32(const Attend& arguments) { Forward<Float32>(arguments).run(); }

void attend_backward_float32(const AttendBackward& arguments) { Backward<Float32>(arguments).run(); }

}  // namespace t2t
