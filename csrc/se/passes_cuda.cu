#include "passes.h"
namespace t2t { const Passes& cuda_passes() { static Passes p{}; return p; } }
