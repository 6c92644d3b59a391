// The passes on the CPU, with the vectors of the instruction set that the extension is built for.
// A task is one image and one strip of channels, so sums have one order whatever the number of threads.
#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <iterator>
#include <numeric>
#include <type_traits>

#include "../cpu/math.h"
#include "passes.h"

namespace t2t {

namespace {

using at::vec::Vectorized;

constexpr int64_t kStrip = 256;    // channels
constexpr int64_t kGrain = 32768;  // numbers that are worth a thread

template <class T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Two vectors of float or double: as many numbers as one vector of 16-bit ones holds.
template <class A>
struct Pack {
  static constexpr int64_t size = 2 * Vectorized<A>::size();
  Vectorized<A> low, high;
};

template <class A>
int64_t second_half(int64_t count) {
  return std::max<int64_t>(count - Vectorized<A>::size(), 0);
}

template <class A, class T>
Pack<A> load(const T* from, int64_t count) {
  constexpr int64_t half = Vectorized<A>::size();
  if constexpr (std::is_same_v<A, T>) {
    if (count >= 2 * half) return {Vectorized<A>::loadu(from), Vectorized<A>::loadu(from + half)};
    return {Vectorized<A>::loadu(from, std::min(count, half)), Vectorized<A>::loadu(from + half, second_half<A>(count))};
  } else {
    const auto [low, high] = at::vec::convert_to_float<T>(
        count >= 2 * half ? Vectorized<T>::loadu(from) : Vectorized<T>::loadu(from, count));
    return {low, high};
  }
}

template <class A, class T>
void store(T* to, const Pack<A>& pack, int64_t count) {
  constexpr int64_t half = Vectorized<A>::size();
  if constexpr (std::is_same_v<A, T>) {
    pack.low.store(to, std::min(count, half));
    if (count > half) pack.high.store(to + half, std::min(second_half<A>(count), half));
  } else {
    at::vec::convert_from_float<T>(pack.low, pack.high).store(to, std::min(count, 2 * half));
  }
}

template <class A, class T>
Pack<A> load_or_zero(const T* from, int64_t at, int64_t count) {
  return from == nullptr ? Pack<A>{Vectorized<A>(0), Vectorized<A>(0)} : load<A>(from + at, count);
}

template <class A, class F>
Pack<A> map(F function, const Pack<A>& a) {
  return {function(a.low), function(a.high)};
}

template <class A, class F, class... Packs>
Pack<A> map(F function, const Pack<A>& a, const Packs&... others) {
  return {function(a.low, others.low...), function(a.high, others.high...)};
}

constexpr auto add = [](auto a, auto b) { return a + b; };

// Sums over tokens of one strip, in L1.
template <class A>
struct Sums {
  alignas(64) A values[kStrip] = {};
  void add_to(int64_t column, const Pack<A>& pack) {
    store(values + column, map(add, load<A>(values + column, Pack<A>::size), pack), Pack<A>::size);
  }
};

// run(image, first channel, width) for every image and strip, on all threads.
template <class F>
void for_strips(const Extent& extent, F&& run) {
  const int64_t strips = (extent.channels + kStrip - 1) / kStrip;
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, extent.tokens * kStrip));
  at::parallel_for(0, extent.images * strips, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task % strips * kStrip;
      run(task / strips, first, std::min(kStrip, extent.channels - first));
    }
  });
}

// run(offset of a pack in the tokens, column in the strip, count) for every pack of an image's strip.
template <class A, class F>
void for_packs(const Extent& extent, int64_t image, int64_t first, int64_t width, F&& run) {
  for (int64_t token = 0; token < extent.tokens; ++token) {
    const int64_t row = (image * extent.tokens + token) * extent.channels + first;
    for (int64_t column = 0; column < width; column += Pack<A>::size) {
      run(row + column, column, std::min(Pack<A>::size, width - column));
    }
  }
}

template <class A>
void store_sums(const Sums<A>& sums, A factor, void* to, int64_t at, int64_t width) {
  A* out = static_cast<A*>(to) + at;
  for (int64_t column = 0; column < width; ++column) out[column] = sums.values[column] * factor;
}

void activate(const Activate& args, void*) {
  with_type<c10::Half, c10::BFloat16>(args.type, [&]<class T>(T*) {
    using A = Acc<T>;
    const T* input = static_cast<const T*>(args.input);
    const A* bias = static_cast<const A*>(args.bias);
    T* output = static_cast<T*>(args.output);
    for_strips(args.extent, [&](int64_t image, int64_t first, int64_t width) {
      Sums<A> sums;
      for_packs<A>(args.extent, image, first, width, [&](int64_t at, int64_t column, int64_t count) {
        const auto x = map(add, load<A>(input + at, count), load_or_zero<A>(bias, first + column, count));
        const auto y = map([](auto v) { return gelu(v); }, x);
        store(output + at, y, count);
        sums.add_to(column, y);
      });
      store_sums(sums, A(1) / A(args.extent.tokens), args.mean, image * args.extent.channels + first, width);
    });
  });
}

void token_mean(const TokenMean& args, void*) {
  with_type<c10::Half, c10::BFloat16>(args.type, [&]<class T>(T*) {
    using A = Acc<T>;
    const T* input = static_cast<const T*>(args.input);
    for_strips(args.extent, [&](int64_t image, int64_t first, int64_t width) {
      Sums<A> sums;
      for_packs<A>(args.extent, image, first, width, [&](int64_t at, int64_t column, int64_t count) {
        sums.add_to(column, load<A>(input + at, count));
      });
      store_sums(sums, A(1) / A(args.extent.tokens), args.mean, image * args.extent.channels + first, width);
    });
  });
}

template <class A>
A dot(const A* a, const A* b, int64_t length) {
  const auto multiply_add = [](auto x, auto y, auto sum) { return at::vec::fmadd(x, y, sum); };
  Pack<A> sum{Vectorized<A>(0), Vectorized<A>(0)};
  for (int64_t i = 0; i < length; i += Pack<A>::size) {
    const int64_t count = std::min(Pack<A>::size, length - i);
    sum = map(multiply_add, load<A>(a + i, count), load<A>(b + i, count), sum);
  }
  alignas(64) A lanes[Vectorized<A>::size()];
  (sum.low + sum.high).store(lanes);
  return std::accumulate(std::begin(lanes), std::end(lanes), A(0));
}

// to = sum over r of weights[r] * rows[r, :], rows being (count, length).
template <class A>
void combine(A* to, const A* weights, const A* rows, int64_t count, int64_t length) {
  const auto multiply_add = [](auto x, auto y, auto sum) { return at::vec::fmadd(x, y, sum); };
  for (int64_t i = 0; i < length; i += Pack<A>::size) {
    const int64_t width = std::min(Pack<A>::size, length - i);
    Pack<A> sum{Vectorized<A>(0), Vectorized<A>(0)};
    for (int64_t r = 0; r < count; ++r) {
      const Pack<A> weight{Vectorized<A>(weights[r]), Vectorized<A>(weights[r])};
      sum = map(multiply_add, weight, load<A>(rows + r * length + i, width), sum);
    }
    store(to + i, sum, width);
  }
}

void gate(const Gate& args, void*) {
  const auto run = [&]<class A>(A*) {
    const auto in = [](const void* from) { return static_cast<const A*>(from); };
    const int64_t channels = args.channels, work = (args.in_channels + channels) * args.reduced_channels;
    at::parallel_for(0, args.images, 1 + kGrain / (1 + work), [&](int64_t begin, int64_t end) {
      for (int64_t image = begin; image < end; ++image) {
        A* reduced = static_cast<A*>(args.reduced) + image * args.reduced_channels;
        for (int64_t r = 0; r < args.reduced_channels; ++r) {
          const A* row = in(args.w_reduce) + r * args.in_channels;
          const A sum = dot(row, in(args.mean) + image * args.in_channels, args.in_channels);
          reduced[r] = std::max(sum + (args.offset == nullptr ? A(0) : in(args.offset)[r]), A(0));
        }
        A* gates = static_cast<A*>(args.gate) + image * channels;
        A* factors = static_cast<A*>(args.factor) + image * channels;
        combine(gates, reduced, in(args.w_expand), args.reduced_channels, channels);
        const Vectorized<A> scale(args.scale == nullptr ? A(1) : in(args.scale)[image]);
        for (int64_t c = 0; c < channels; c += Pack<A>::size) {
          const int64_t count = std::min(Pack<A>::size, channels - c);
          const auto g = map([](auto z) { return sigmoid(z); }, load<A>(gates + c, count));
          const auto factor = map([&](auto v) { return v * scale; }, g);
          store(gates + c, g, count);
          store(factors + c, factor, count);
          if (args.bias != nullptr) {
            A* shifts = static_cast<A*>(args.shift) + image * channels;
            store(shifts + c, map([](auto f, auto b) { return f * b; }, factor, load<A>(in(args.bias) + c, count)), count);
          }
        }
      }
    });
  };
  args.type == Type::Double ? run(static_cast<double*>(nullptr)) : run(static_cast<float*>(nullptr));
}

void affine(const Affine& args, void*) {
  with_type_pair<c10::Half, c10::BFloat16>(args.in_type, args.out_type, [&]<class T, class O>(T*, O*) {
    using A = Acc<T>;
    const T* input = static_cast<const T*>(args.input);
    const O* residual = static_cast<const O*>(args.residual);
    O* output = static_cast<O*>(args.output);
    const auto multiply_add = [](auto x, auto y, auto sum) { return at::vec::fmadd(x, y, sum); };
    for_strips(args.extent, [&](int64_t image, int64_t first, int64_t width) {
      const int64_t base = image * args.extent.channels + first;
      const A* factor = static_cast<const A*>(args.factor) + base;
      const A* shift = args.shift == nullptr ? nullptr : static_cast<const A*>(args.shift) + base;
      for_packs<A>(args.extent, image, first, width, [&](int64_t at, int64_t column, int64_t count) {
        auto y = map(multiply_add, load<A>(input + at, count), load<A>(factor + column, count),
                     load_or_zero<A>(shift, column, count));
        if (residual != nullptr) y = map(add, y, load<A>(residual + at, count));
        store(output + at, y, count);
      });
    });
  });
}

void reduce_grad(const ReduceGrad& args, void*) {
  with_type_pair<c10::Half, c10::BFloat16>(args.grad_type, args.product_type, [&]<class G, class T>(G*, T*) {
    using A = Acc<G>;
    const G* grad = static_cast<const G*>(args.grad);
    const T* product = static_cast<const T*>(args.product);
    for_strips(args.extent, [&](int64_t image, int64_t first, int64_t width) {
      Sums<A> sums, dots;
      for_packs<A>(args.extent, image, first, width, [&](int64_t at, int64_t column, int64_t count) {
        const auto g = load<A>(grad + at, count);
        sums.add_to(column, g);
        dots.add_to(column, map([](auto a, auto b) { return a * b; }, g, load<A>(product + at, count)));
      });
      store_sums(sums, A(1), args.sum, image * args.extent.channels + first, width);
      store_sums(dots, A(1), args.dot, image * args.extent.channels + first, width);
    });
  });
}

void gate_backward(const GateBackward& args, void*) {
  const auto run = [&]<class A>(A*) {
    const auto in = [](const void* from) { return static_cast<const A*>(from); };
    const auto out = [](void* to) { return static_cast<A*>(to); };
    const int64_t channels = args.channels, work = 2 * channels * args.reduced_channels;
    at::parallel_for(0, args.images, 1 + kGrain / (1 + work), [&](int64_t begin, int64_t end) {
      for (int64_t image = begin; image < end; ++image) {
        const int64_t base = image * channels;
        const A scale = args.scale == nullptr ? A(1) : in(args.scale)[image];
        A d_scale = 0;
        for (int64_t c = 0; c < channels; ++c) {
          const A gate = in(args.gate)[base + c], bias = args.bias == nullptr ? A(0) : in(args.bias)[c];
          const A grad_dot_y = in(args.dot)[base + c] + bias * in(args.sum)[base + c];
          out(args.d_expanded)[base + c] = gate_argument_grad(gate, scale, grad_dot_y);
          out(args.factor)[base + c] = scale * gate;
          d_scale += gate * grad_dot_y;
        }
        out(args.d_scale)[image] = d_scale;
        A* d_reduced = out(args.d_reduced) + image * args.reduced_channels;
        for (int64_t r = 0; r < args.reduced_channels; ++r) {
          const bool passes = in(args.reduced)[image * args.reduced_channels + r] > 0;
          d_reduced[r] = passes ? dot(in(args.w_expand) + r * channels, in(args.d_expanded) + base, channels) : A(0);
        }
        combine(out(args.shift) + base, d_reduced, in(args.w_reduce), args.reduced_channels, channels);
        for (int64_t c = 0; c < channels; ++c) {
          const A d_mean = out(args.shift)[base + c];
          out(args.d_bias)[base + c] = out(args.factor)[base + c] * in(args.sum)[base + c] + d_mean;
          out(args.shift)[base + c] = d_mean / A(args.tokens);
        }
      }
    });
  };
  args.type == Type::Double ? run(static_cast<double*>(nullptr)) : run(static_cast<float*>(nullptr));
}

void activate_backward(const ActivateBackward& args, void*) {
  with_type<c10::Half, c10::BFloat16>(args.type, [&]<class T>(T*) {
    using A = Acc<T>;
    const T* input = static_cast<const T*>(args.input);
    const T* d_output = static_cast<const T*>(args.d_output);
    const A* bias = static_cast<const A*>(args.bias);
    T* output = static_cast<T*>(args.output);
    T* d_input = static_cast<T*>(args.d_input);
    for_strips(args.extent, [&](int64_t image, int64_t first, int64_t width) {
      Sums<A> sums;
      for_packs<A>(args.extent, image, first, width, [&](int64_t at, int64_t column, int64_t count) {
        const auto x = map(add, load<A>(input + at, count), load_or_zero<A>(bias, first + column, count));
        Pack<A> y, slope;
        gelu_with_slope(x.low, y.low, slope.low);
        gelu_with_slope(x.high, y.high, slope.high);
        const auto d = map([](auto a, auto b) { return a * b; }, load<A>(d_output + at, count), slope);
        store(output + at, y, count);
        store(d_input + at, d, count);
        sums.add_to(column, d);
      });
      store_sums(sums, A(1), args.d_bias, image * args.extent.channels + first, width);
    });
  });
}

}  // namespace

const Passes& cpu_passes() {
  static constexpr Passes passes{activate,    token_mean,    gate, affine, reduce_grad, gate_backward,
                                 activate_backward};
  return passes;
}

}  // namespace t2t
