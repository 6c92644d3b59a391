// How a batch is worked through. On a GPU all at once; on the CPU every thread takes its share of the images in chunks
// that stay in its cache from one step to the next, so that threads meet only once. Where there are fewer images than
// threads, all at once too: then every step shares the threads.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>

#include "device.h"

namespace t2t {

struct Chunks {
  int64_t images, share, chunk, slots;  // slots: how many chunks are under way together

  Chunks(const at::Tensor& x, int64_t bytes_per_image, bool at_once = false) : images(x.size(0)) {
    constexpr int64_t kCacheBytes = 1 << 20;
    const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
    at_once = at_once || !x.is_cpu() || images < threads;
    share = at_once ? images : (images + threads - 1) / threads;
    slots = at_once ? 1 : (images + share - 1) / share;
    const int64_t fitting = std::max<int64_t>(1, kCacheBytes / std::max<int64_t>(1, bytes_per_image));
    const int64_t rounds = std::max<int64_t>(1, (share + fitting - 1) / fitting);
    chunk = at_once ? images : (share + rounds - 1) / rounds;
  }

  // run(slot, whether it is the slot's first, first image, number of images)
  template <class F>
  void for_each(const at::Tensor& x, F&& run) const {
    if (slots == 1 && chunk == images) return run(0, true, 0, images);
    at::parallel_for(0, slots, 1, [&](int64_t begin, int64_t end) {
      const DeviceScope scope(x);  // threads have dispatch keys of their own
      for (int64_t slot = begin; slot < end; ++slot) {
        const int64_t last = std::min(images, (slot + 1) * share);
        for (int64_t first = slot * share; first < last; first += chunk) {
          run(slot, first == slot * share, first, std::min(chunk, last - first));
        }
      }
    });
  }
};

}  // namespace t2t
