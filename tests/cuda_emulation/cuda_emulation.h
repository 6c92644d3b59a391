// CUDA's execution model on the CPU, enough to run this project's kernels as C++ under the sanitizers.
//
// A block's threads are fibers on one thread of the CPU, resumed in turn until all have returned. A thread gives way
// only at __syncthreads and at shuffles, so what one thread has not reached has not happened for the others: a missing
// barrier reads what nobody has written yet. emulation::order() chooses who comes first. Shared memory is on the heap,
// exactly as large as the launch asked for, and holds NaNs until written.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(threads)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace emulation {

constexpr int kWarpSize = 32;
constexpr size_t kStackBytes = 256 * 1024;

// Switches between stacks as AddressSanitizer wants to be told of.
struct Fiber {
  ucontext_t context{};
  void* fake_stack = nullptr;
  bool finished = false;
};

struct Warp {
  int arrived = 0, left = 0;
  unsigned char values[kWarpSize][16] = {};
};

class Block {
 public:
  Block(dim3 grid, dim3 block, dim3 at, size_t shared_bytes, const std::function<void()>& body)
      : grid_(grid), block_(block), at_(at), body_(body), shared_(new unsigned char[shared_bytes]),
        threads_(block.x), warps_((block.x + kWarpSize - 1) / kWarpSize) {
    std::memset(shared_.get(), 0xff, shared_bytes);
  }

  // Runs all threads to their end.
  void run();

  dim3 grid_, block_, at_;
  unsigned thread_ = 0;  // the one that runs

  void* shared() { return shared_.get(); }

  // Waits until every thread of the block that still runs is here.
  void synchronize() {
    const uint64_t round = round_;
    ++waiting_;
    while (round_ == round) yield();
  }

  // Gives each lane of a whole warp the value of the lane that differs from it by `mask`.
  template <class T>
  T exchange(T value, int mask) {
    static_assert(sizeof(T) <= 16);
    Warp& warp = warps_[thread_ / kWarpSize];
    const int lane = thread_ % kWarpSize, size = warp_size();
    if ((lane ^ mask) >= size) throw std::logic_error("a shuffle reads a lane that does not exist");
    while (warp.left > 0) yield();  // the last exchange is not over
    std::memcpy(warp.values[lane], &value, sizeof(T));
    ++warp.arrived;
    while (warp.arrived < size && warp.left == 0) yield();
    if (warp.left == 0) warp.left = size;
    std::memcpy(&value, warp.values[lane ^ mask], sizeof(T));
    if (--warp.left == 0) warp.arrived = 0;
    return value;
  }

 private:
  int warp_size() const {
    const int rest = int(block_.x) - int(thread_ / kWarpSize) * kWarpSize;
    return rest < kWarpSize ? rest : kWarpSize;
  }
  void yield();
  static void enter();
  void start_switch(void** save, const void* bottom, size_t size) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(save, bottom, size);
#endif
  }
  void finish_switch(void* save, const void** bottom, size_t* size) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(save, bottom, size);
#endif
  }

  const std::function<void()>& body_;
  std::unique_ptr<unsigned char[]> shared_;
  std::vector<Fiber> threads_;
  std::vector<Warp> warps_;
  ucontext_t scheduler_{};
  void* scheduler_fake_stack_ = nullptr;
  const void* scheduler_bottom_ = nullptr;
  size_t scheduler_size_ = 0;
  uint64_t round_ = 0, waiting_ = 0;
};

inline Block*& current() {
  static Block* block = nullptr;
  return block;
}

inline void Block::enter() {
  Block& block = *current();
  block.finish_switch(nullptr, &block.scheduler_bottom_, &block.scheduler_size_);
  block.body_();
  Fiber& self = block.threads_[block.thread_];
  self.finished = true;
  block.start_switch(nullptr, block.scheduler_bottom_, block.scheduler_size_);
  swapcontext(&self.context, &block.scheduler_);
}

inline void Block::yield() {
  Fiber& self = threads_[thread_];
  start_switch(&self.fake_stack, scheduler_bottom_, scheduler_size_);
  swapcontext(&self.context, &scheduler_);
  finish_switch(self.fake_stack, &scheduler_bottom_, &scheduler_size_);
}

// The order in which a block's threads are resumed: 0 the first first, 1 the last first, 2 and above mixed.
inline int& order() {
  static int chosen = 0;
  return chosen;
}

inline unsigned in_order(unsigned turn, unsigned count) {
  if (order() == 0) return turn;
  if (order() == 1) return count - 1 - turn;
  return unsigned((uint64_t(turn) * 97 + 13 * order()) % count);  // 97 shares no factor with a power of two
}

// The stack of a block's thread; the next block takes it over.
inline char* stack_of(unsigned thread) {
  static std::vector<std::unique_ptr<char[]>> stacks;
  while (stacks.size() <= thread) stacks.emplace_back(new char[kStackBytes]);
  return stacks[thread].get();
}

inline void Block::run() {
  current() = this;
  unsigned running = block_.x;
  for (unsigned i = 0; i < block_.x; ++i) {
    Fiber& thread = threads_[i];
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(stack_of(i), kStackBytes);
#endif
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = stack_of(i);
    thread.context.uc_stack.ss_size = kStackBytes;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, &Block::enter, 0);
  }
  while (running > 0) {
    for (unsigned turn = 0; turn < block_.x; ++turn) {
      thread_ = in_order(turn, block_.x);
      Fiber& thread = threads_[thread_];
      if (thread.finished) continue;
      start_switch(&scheduler_fake_stack_, stack_of(thread_), kStackBytes);
      swapcontext(&scheduler_, &thread.context);
      finish_switch(scheduler_fake_stack_, nullptr, nullptr);
      if (thread.finished) --running;
    }
    if (waiting_ > 0 && waiting_ == running) {
      waiting_ = 0;
      ++round_;
    }
  }
  current() = nullptr;
}


}  // namespace emulation

#define threadIdx (dim3(emulation::current()->thread_, 0, 0))
#define blockIdx (emulation::current()->at_)
#define blockDim (emulation::current()->block_)
#define gridDim (emulation::current()->grid_)

inline void __syncthreads() { emulation::current()->synchronize(); }

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  if (mask != 0xffffffffu) throw std::logic_error("only whole warps are emulated");
  return emulation::current()->exchange(value, lane_mask);
}

namespace t2t {

template <class T>
T* shared_memory() {
  return static_cast<T*>(emulation::current()->shared());
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
            const Arguments&... arguments) {
  const std::function<void()> body = [&] { kernel(static_cast<Parameters>(arguments)...); };
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) emulation::Block(grid, block, dim3(x, y, 0), shared_bytes, body).run();
  }
}

}  // namespace t2t
