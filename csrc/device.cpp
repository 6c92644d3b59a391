#include "device.h"

#ifdef T2T_FAST_CUDA
#include <c10/cuda/CUDAStream.h>
#endif

namespace t2t {

DeviceScope::DeviceScope(const at::Tensor& tensor)
    : device_(tensor.device()), keys_(c10::autograd_dispatch_keyset_with_ADInplaceOrView | c10::autocast_dispatch_keyset) {
#ifdef T2T_FAST_CUDA
  if (tensor.is_cuda()) stream_ = c10::cuda::getCurrentCUDAStream(tensor.get_device()).stream();
#endif
}

}  // namespace t2t
