// What kernels need beside CUDA itself. With T2T_FAST_EMULATION they compile as C++ and run on the CPU, for tests.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#ifdef T2T_FAST_EMULATION
#include "cuda_emulation.h"
#else

namespace t2t {

// The block's shared memory, as many bytes as its launch asked for.
template <class T>
__device__ __forceinline__ T* shared_memory() {
  extern __shared__ __align__(16) unsigned char t2t_shared_memory[];
  return reinterpret_cast<T*>(t2t_shared_memory);
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
            const Arguments&... arguments) {
  if (grid.x == 0 || grid.y == 0) return;  // an empty batch
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("a kernel of t2t_fast could not be launched: ") + cudaGetErrorString(error));
  }
}

}  // namespace t2t

#endif

namespace t2t {

constexpr unsigned kWholeWarp = 0xffffffffu;
constexpr int kWarp = 32;

// `Count` neighbouring numbers, read and written 16 bytes at a time where they are aligned.
template <class T, int Count>
struct Vector {
  static constexpr int kPiece = 16 / sizeof(T) < Count ? 16 / sizeof(T) : Count;
  struct alignas(sizeof(T) * kPiece) Piece {
    T values[kPiece];
  };

  Piece pieces[Count / kPiece];

  __device__ __forceinline__ T& operator[](int i) { return pieces[i / kPiece].values[i % kPiece]; }
  __device__ __forceinline__ const T& operator[](int i) const { return pieces[i / kPiece].values[i % kPiece]; }

  // The first `valid` of them; the others are zero.
  __device__ __forceinline__ void load(const T* from, int valid, bool aligned) {
    if (aligned && valid >= Count) {
#pragma unroll
      for (int i = 0; i < Count / kPiece; ++i) pieces[i] = reinterpret_cast<const Piece*>(from)[i];
    } else {
#pragma unroll
      for (int i = 0; i < Count; ++i) (*this)[i] = i < valid ? from[i] : T(0);
    }
  }

  __device__ __forceinline__ void store(T* to, int valid, bool aligned) const {
    if (aligned && valid >= Count) {
#pragma unroll
      for (int i = 0; i < Count / kPiece; ++i) reinterpret_cast<Piece*>(to)[i] = pieces[i];
    } else {
#pragma unroll
      for (int i = 0; i < Count; ++i) {
        if (i < valid) to[i] = (*this)[i];
      }
    }
  }
};

template <class T>
bool is_aligned(const T* pointer) {
  return reinterpret_cast<std::uintptr_t>(pointer) % 16 == 0;
}

// The sum over a warp's lanes that differ by multiples of `first`, a power of two, in every lane; one fixed order.
template <class A>
__device__ __forceinline__ A sum_over_lanes(A value, int first) {
  for (int offset = kWarp / 2; offset >= first; offset /= 2) value += __shfl_xor_sync(kWholeWarp, value, offset);
  return value;
}

}  // namespace t2t
