#include "windows.h"

namespace t2t {

void windows_linear_float32(const WindowsLinear& arguments) { Windows<Float32>(arguments).run(); }

}  // namespace t2t
