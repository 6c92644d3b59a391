// The passes on CUDA. A block is one image and one tile of channels: its threads lie side by side along the channels,
// 16 bytes each, and the rows of threads take turns at the tokens. A sum over tokens is collected per thread, then over
// the lanes of a warp that share channels (shuffles), then over the warps (shared memory): one order, no atomics.
// The gate's two kernels are a block per image. No launch waits for the device or asks it for memory.
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include "../cuda/launch.h"
#include "formulas.h"
#include "passes.h"

namespace t2t {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

template <class T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Channels per thread for tokens of types T and U: 16 bytes of the narrower.
template <class T, class U = T>
constexpr int kWidth = 16 / (sizeof(T) < sizeof(U) ? sizeof(T) : sizeof(U));

// A block's share of the tokens.
struct Tile {
  Extent extent;
  int lanes;  // threads along the channels: a power of two, at most a warp
  bool aligned;
};

// What one thread does of it.
template <int Width>
struct Place {
  int64_t base;     // of the image's first token, at this thread's first channel
  int64_t channel;  // the first of this thread
  int64_t image;
  int valid;  // of its channels; none beyond the last
  int row, rows;

  __device__ __forceinline__ explicit Place(const Tile& tile)
      : channel((int64_t(blockIdx.y) * tile.lanes + threadIdx.x % tile.lanes) * Width),
        image(blockIdx.x),
        row(threadIdx.x / tile.lanes),
        rows(kThreads / tile.lanes) {
    const int64_t left = tile.extent.channels - channel;
    valid = left < 0 ? 0 : left < Width ? int(left) : Width;
    base = image * tile.extent.tokens * tile.extent.channels + channel;
  }
};

// run(offset) for this thread's tokens, `AtOnce` of whose loads may be under way together.
template <int AtOnce, class P, class Load, class Use>
__device__ __forceinline__ void for_tokens(const Tile& tile, const P& place, Load&& load, Use&& use) {
  if (place.valid == 0) return;
  for (int64_t token = place.row; token < tile.extent.tokens; token += int64_t(AtOnce) * place.rows) {
#pragma unroll
    for (int i = 0; i < AtOnce; ++i) {
      const int64_t at = token + int64_t(i) * place.rows;
      if (at < tile.extent.tokens) load(i, place.base + at * tile.extent.channels);
    }
#pragma unroll
    for (int i = 0; i < AtOnce; ++i) {
      const int64_t at = token + int64_t(i) * place.rows;
      if (at < tile.extent.tokens) use(i, place.base + at * tile.extent.channels);
    }
  }
}

// Every thread's sums over its tokens to the block's, times `factor`, into `out` (images, channels).
template <class A, int Width>
__device__ __forceinline__ void store_sums(const Tile& tile, const Place<Width>& place, A (&sums)[Width], A factor,
                                           A* out) {
  A* partial = shared_memory<A>();  // (warps, lanes * Width)
  const int thread = threadIdx.x, lane = thread % tile.lanes, warp = thread / kWarp, across = tile.lanes * Width;
#pragma unroll
  for (int i = 0; i < Width; ++i) {
    const A sum = sum_over_lanes(sums[i], tile.lanes);
    if (thread % kWarp < tile.lanes) partial[warp * across + lane * Width + i] = sum;
  }
  __syncthreads();
  const int64_t first = int64_t(blockIdx.y) * across;
  for (int i = thread; i < across; i += kThreads) {
    if (first + i >= tile.extent.channels) break;
    A sum = 0;
    for (int w = 0; w < kWarps; ++w) sum += partial[w * across + i];
    out[place.image * tile.extent.channels + first + i] = sum * factor;
  }
  __syncthreads();  // the shared memory may be filled again
}

template <class A, int Width>
__device__ __forceinline__ void load_or_zero(A (&to)[Width], const A* from, int64_t at, int valid) {
#pragma unroll
  for (int i = 0; i < Width; ++i) to[i] = from != nullptr && i < valid ? from[at + i] : A(0);
}

template <class T>
__global__ void __launch_bounds__(kThreads) activate_kernel(Tile tile, const T* input, const Acc<T>* bias, T* output,
                                                            Acc<T>* mean) {
  using A = Acc<T>;
  constexpr int kWide = kWidth<T>, kAtOnce = 4;
  const Place<kWide> place(tile);
  A biases[kWide], sums[kWide] = {};
  load_or_zero(biases, bias, place.channel, place.valid);
  Vector<T, kWide> x[kAtOnce];
  for_tokens<kAtOnce>(
      tile, place, [&](int i, int64_t at) { x[i].load(input + at, place.valid, tile.aligned); },
      [&](int i, int64_t at) {
#pragma unroll
        for (int c = 0; c < kWide; ++c) {
          const A y = gelu(A(x[i][c]) + biases[c]);
          x[i][c] = T(y);
          sums[c] += y;
        }
        x[i].store(output + at, place.valid, tile.aligned);
      });
  store_sums(tile, place, sums, A(1) / A(tile.extent.tokens), mean);
}

template <class T>
__global__ void __launch_bounds__(kThreads) token_mean_kernel(Tile tile, const T* input, Acc<T>* mean) {
  using A = Acc<T>;
  constexpr int kWide = kWidth<T>, kAtOnce = 4;
  const Place<kWide> place(tile);
  A sums[kWide] = {};
  Vector<T, kWide> x[kAtOnce];
  for_tokens<kAtOnce>(
      tile, place, [&](int i, int64_t at) { x[i].load(input + at, place.valid, tile.aligned); },
      [&](int i, int64_t) {
#pragma unroll
        for (int c = 0; c < kWide; ++c) sums[c] += A(x[i][c]);
      });
  store_sums(tile, place, sums, A(1) / A(tile.extent.tokens), mean);
}

template <class T, class O>
__global__ void __launch_bounds__(kThreads) affine_kernel(Tile tile, const T* input, const Acc<T>* factor,
                                                          const Acc<T>* shift, const O* residual, O* output) {
  using A = Acc<T>;
  constexpr int kWide = kWidth<T, O>, kAtOnce = 2;
  const Place<kWide> place(tile);
  A factors[kWide], shifts[kWide];
  const int64_t at_image = place.image * tile.extent.channels + place.channel;
  load_or_zero(factors, factor, at_image, place.valid);
  load_or_zero(shifts, shift, at_image, place.valid);
  Vector<T, kWide> x[kAtOnce];
  Vector<O, kWide> y[kAtOnce];
  for_tokens<kAtOnce>(
      tile, place,
      [&](int i, int64_t at) {
        x[i].load(input + at, place.valid, tile.aligned);
        y[i].load(residual == nullptr ? output : residual + at, residual == nullptr ? 0 : place.valid, tile.aligned);
      },
      [&](int i, int64_t at) {
#pragma unroll
        for (int c = 0; c < kWide; ++c) y[i][c] = O(A(y[i][c]) + (factors[c] * A(x[i][c]) + shifts[c]));
        y[i].store(output + at, place.valid, tile.aligned);
      });
}

template <class G, class T>
__global__ void __launch_bounds__(kThreads) reduce_grad_kernel(Tile tile, const G* grad, const T* product, Acc<G>* sum,
                                                               Acc<G>* dot) {
  using A = Acc<G>;
  constexpr int kWide = kWidth<G, T>, kAtOnce = 2;
  const Place<kWide> place(tile);
  A sums[kWide] = {}, dots[kWide] = {};
  Vector<G, kWide> g[kAtOnce];
  Vector<T, kWide> p[kAtOnce];
  for_tokens<kAtOnce>(
      tile, place,
      [&](int i, int64_t at) {
        g[i].load(grad + at, place.valid, tile.aligned);
        p[i].load(product + at, place.valid, tile.aligned);
      },
      [&](int i, int64_t) {
#pragma unroll
        for (int c = 0; c < kWide; ++c) {
          sums[c] += A(g[i][c]);
          dots[c] += A(g[i][c]) * A(p[i][c]);
        }
      });
  store_sums(tile, place, sums, A(1), sum);
  store_sums(tile, place, dots, A(1), dot);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    activate_backward_kernel(Tile tile, const T* input, const Acc<T>* bias, const T* d_output, T* d_input, T* output,
                             Acc<T>* d_bias) {
  using A = Acc<T>;
  constexpr int kWide = kWidth<T>, kAtOnce = sizeof(T) == 8 ? 1 : 2;  // two of double would spill
  const Place<kWide> place(tile);
  A biases[kWide], sums[kWide] = {};
  load_or_zero(biases, bias, place.channel, place.valid);
  Vector<T, kWide> x[kAtOnce], d[kAtOnce];
  for_tokens<kAtOnce>(
      tile, place,
      [&](int i, int64_t at) {
        x[i].load(input + at, place.valid, tile.aligned);
        d[i].load(d_output + at, place.valid, tile.aligned);
      },
      [&](int i, int64_t at) {
#pragma unroll
        for (int c = 0; c < kWide; ++c) {
          A y, slope;
          gelu_with_slope(A(x[i][c]) + biases[c], y, slope);
          const A grad = A(d[i][c]) * slope;
          x[i][c] = T(y);
          d[i][c] = T(grad);
          sums[c] += grad;
        }
        x[i].store(output + at, place.valid, tile.aligned);
        d[i].store(d_input + at, place.valid, tile.aligned);
      });
  store_sums(tile, place, sums, A(1), d_bias);
}

// The sum of a[i] * b[i] over a warp, in every lane.
template <class A>
__device__ __forceinline__ A dot_over_warp(const A* a, const A* b, int64_t length) {
  A sum = 0;
  for (int64_t i = threadIdx.x % kWarp; i < length; i += kWarp) sum += a[i] * b[i];
  return sum_over_lanes(sum, 1);
}

template <class A>
__global__ void __launch_bounds__(kThreads)
    gate_kernel(int64_t in_channels, int64_t reduced_channels, int64_t channels, const A* mean, const A* w_reduce,
                const A* offset, const A* w_expand, const A* bias, const A* scale, A* reduced, A* gate, A* factor,
                A* shift) {
  const int64_t image = blockIdx.x;
  reduced += image * reduced_channels;
  for (int64_t r = threadIdx.x / kWarp; r < reduced_channels; r += kWarps) {
    const A sum = dot_over_warp(w_reduce + r * in_channels, mean + image * in_channels, in_channels);
    const A value = sum + (offset == nullptr ? A(0) : offset[r]);
    if (threadIdx.x % kWarp == 0) reduced[r] = value > A(0) ? value : A(0);
  }
  __syncthreads();
  const A of_image = scale == nullptr ? A(1) : scale[image];
  for (int64_t c = threadIdx.x; c < channels; c += kThreads) {
    A argument = 0;
    for (int64_t r = 0; r < reduced_channels; ++r) argument += reduced[r] * w_expand[r * channels + c];
    const A value = sigmoid(argument);
    gate[image * channels + c] = value;
    factor[image * channels + c] = of_image * value;
    if (bias != nullptr) shift[image * channels + c] = of_image * value * bias[c];
  }
}

template <class A>
__global__ void __launch_bounds__(kThreads)
    gate_backward_kernel(int64_t tokens, int64_t reduced_channels, int64_t channels, const A* sum, const A* dot,
                         const A* gate, const A* reduced, const A* w_reduce, const A* w_expand, const A* bias,
                         const A* scale, A* d_expanded, A* d_reduced, A* factor, A* shift, A* d_bias, A* d_scale) {
  const int64_t image = blockIdx.x, base = image * channels;
  const A of_image = scale == nullptr ? A(1) : scale[image];
  d_reduced += image * reduced_channels;
  A of_scale = 0;
  for (int64_t c = threadIdx.x; c < channels; c += kThreads) {
    const A value = gate[base + c];
    const A grad_dot_y = dot[base + c] + (bias == nullptr ? A(0) : bias[c]) * sum[base + c];
    d_expanded[base + c] = gate_argument_grad(value, of_image, grad_dot_y);
    factor[base + c] = of_image * value;
    of_scale += value * grad_dot_y;
  }
  A* partial = shared_memory<A>();  // (warps)
  of_scale = sum_over_lanes(of_scale, 1);
  if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = of_scale;
  __syncthreads();
  if (threadIdx.x == 0) {
    A total = 0;
    for (int w = 0; w < kWarps; ++w) total += partial[w];
    d_scale[image] = total;
  }
  for (int64_t r = threadIdx.x / kWarp; r < reduced_channels; r += kWarps) {
    const A value = dot_over_warp(w_expand + r * channels, d_expanded + base, channels);
    if (threadIdx.x % kWarp == 0) d_reduced[r] = reduced[image * reduced_channels + r] > A(0) ? value : A(0);
  }
  __syncthreads();
  for (int64_t c = threadIdx.x; c < channels; c += kThreads) {
    A d_mean = 0;
    for (int64_t r = 0; r < reduced_channels; ++r) d_mean += d_reduced[r] * w_reduce[r * channels + c];
    shift[base + c] = d_mean / A(tokens);
    d_bias[base + c] = factor[base + c] * sum[base + c] + d_mean;
  }
}

// The number of threads along the channels that leaves the fewest without work, the larger of equals.
int best_lanes(int64_t channels, int width) {
  const int64_t vectors = (channels + width - 1) / width;
  int best = kWarp;
  int64_t fewest = INT64_MAX;
  for (int lanes = kWarp; lanes >= 1; lanes /= 2) {
    const int64_t threads = (vectors + lanes - 1) / lanes * lanes;
    if (threads < fewest && (lanes >= 8 || vectors < 8)) {
      best = lanes;
      fewest = threads;
    }
  }
  return best;
}

// Calls launch(tile, grid, shared bytes) for tokens whose arrays begin at `pointers`.
template <class A, int Width, class F, class... Pointers>
void with_tile(const Extent& extent, F&& run, const Pointers*... pointers) {
  const bool aligned = extent.channels % Width == 0 && (is_aligned(pointers) && ...);
  const Tile tile{extent, best_lanes(extent.channels, Width), aligned};
  const int64_t across = int64_t(tile.lanes) * Width, tiles = (extent.channels + across - 1) / across;
  if (extent.images > INT32_MAX || tiles > 65535) throw std::runtime_error("too many images or channels for a launch");
  run(tile, dim3(unsigned(extent.images), unsigned(tiles)), size_t(kWarps * across * sizeof(A)));
}

template <class F>
void with_token_type(Type type, F&& run) {
  with_type<c10::Half, c10::BFloat16>(type, run);
}

template <class F>
void with_accumulator(Type type, F&& run) {
  type == Type::Double ? run(static_cast<double*>(nullptr)) : run(static_cast<float*>(nullptr));
}

template <class T>
T* as(void* pointer) {
  return static_cast<T*>(pointer);
}

template <class T>
const T* as(const void* pointer) {
  return static_cast<const T*>(pointer);
}

void activate(const Activate& args, void* stream) {
  with_token_type(args.type, [&]<class T>(T*) {
    using A = Acc<T>;
    const auto run = [&](Tile tile, dim3 grid, size_t bytes) {
      launch(activate_kernel<T>, grid, kThreads, bytes, stream, tile, as<T>(args.input), as<A>(args.bias),
             as<T>(args.output), as<A>(args.mean));
    };
    with_tile<A, kWidth<T>>(args.extent, run, as<T>(args.input), as<T>(args.output));
  });
}

void token_mean(const TokenMean& args, void* stream) {
  with_token_type(args.type, [&]<class T>(T*) {
    using A = Acc<T>;
    const auto run = [&](Tile tile, dim3 grid, size_t bytes) {
      launch(token_mean_kernel<T>, grid, kThreads, bytes, stream, tile, as<T>(args.input), as<A>(args.mean));
    };
    with_tile<A, kWidth<T>>(args.extent, run, as<T>(args.input));
  });
}

void affine(const Affine& args, void* stream) {
  with_type_pair<c10::Half, c10::BFloat16>(args.in_type, args.out_type, [&]<class T, class O>(T*, O*) {
    using A = Acc<T>;
    const auto run = [&](Tile tile, dim3 grid, size_t) {
      launch(affine_kernel<T, O>, grid, kThreads, 0, stream, tile, as<T>(args.input), as<A>(args.factor),
             as<A>(args.shift), as<O>(args.residual), as<O>(args.output));
    };
    with_tile<A, kWidth<T, O>>(args.extent, run, as<T>(args.input), as<O>(args.residual), as<O>(args.output));
  });
}

void reduce_grad(const ReduceGrad& args, void* stream) {
  with_type_pair<c10::Half, c10::BFloat16>(args.grad_type, args.product_type, [&]<class G, class T>(G*, T*) {
    using A = Acc<G>;
    const auto run = [&](Tile tile, dim3 grid, size_t bytes) {
      launch(reduce_grad_kernel<G, T>, grid, kThreads, bytes, stream, tile, as<G>(args.grad), as<T>(args.product),
             as<A>(args.sum), as<A>(args.dot));
    };
    with_tile<A, kWidth<G, T>>(args.extent, run, as<G>(args.grad), as<T>(args.product));
  });
}

void activate_backward(const ActivateBackward& args, void* stream) {
  with_token_type(args.type, [&]<class T>(T*) {
    using A = Acc<T>;
    const auto run = [&](Tile tile, dim3 grid, size_t bytes) {
      launch(activate_backward_kernel<T>, grid, kThreads, bytes, stream, tile, as<T>(args.input), as<A>(args.bias),
             as<T>(args.d_output), as<T>(args.d_input), as<T>(args.output), as<A>(args.d_bias));
    };
    with_tile<A, kWidth<T>>(args.extent, run, as<T>(args.input), as<T>(args.d_output), as<T>(args.d_input),
                            as<T>(args.output));
  });
}

void gate(const Gate& args, void* stream) {
  with_accumulator(args.type, [&]<class A>(A*) {
    launch(gate_kernel<A>, dim3(unsigned(args.images)), kThreads, 0, stream, args.in_channels, args.reduced_channels,
           args.channels, as<A>(args.mean), as<A>(args.w_reduce), as<A>(args.offset), as<A>(args.w_expand),
           as<A>(args.bias), as<A>(args.scale), as<A>(args.reduced), as<A>(args.gate), as<A>(args.factor),
           as<A>(args.shift));
  });
}

void gate_backward(const GateBackward& args, void* stream) {
  with_accumulator(args.type, [&]<class A>(A*) {
    launch(gate_backward_kernel<A>, dim3(unsigned(args.images)), kThreads, kWarps * sizeof(A), stream, args.tokens,
           args.reduced_channels, args.channels, as<A>(args.sum), as<A>(args.dot), as<A>(args.gate),
           as<A>(args.reduced), as<A>(args.w_reduce), as<A>(args.w_expand), as<A>(args.bias), as<A>(args.scale),
           as<A>(args.d_expanded), as<A>(args.d_reduced), as<A>(args.factor), as<A>(args.shift), as<A>(args.d_bias),
           as<A>(args.d_scale));
  });
}

}  // namespace

const Passes& cuda_passes() {
  static constexpr Passes passes{activate,    token_mean,    gate, affine, reduce_grad, gate_backward,
                                 activate_backward};
  return passes;
}

}  // namespace t2t
