// Where an operator runs: its device made current, its stream, and autograd and autocast kept out of what it calls.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

namespace t2t {

class DeviceScope {
 public:
  explicit DeviceScope(const at::Tensor& tensor);
  void* stream() const { return stream_; }  // a cudaStream_t, null on the CPU

 private:
  c10::OptionalDeviceGuard device_;
  c10::impl::ExcludeDispatchKeyGuard keys_;
  void* stream_ = nullptr;
};

}  // namespace t2t
