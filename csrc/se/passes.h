// What se_mlp and se_gate compute between and behind the library's matmuls, forward and backward: seven passes,
// implemented for the CPU (per instruction set) and for CUDA. All arrays are contiguous. "acc" is double for double
// tokens and float for every other dtype.
#pragma once

#include <cstdint>
#include <type_traits>

namespace t2t {

enum class Type { Float, Double, Half, BFloat16 };

// Tokens are (images, tokens, channels).
struct Extent {
  int64_t images, tokens, channels;
};

// output = gelu(input + bias), mean = its token mean. `output` may be `input`.
struct Activate {
  Extent extent;
  Type type;
  const void* input;
  const void* bias;  // acc (channels), or null
  void* output;
  void* mean;  // acc (images, channels)
};

struct TokenMean {
  Extent extent;
  Type type;
  const void* input;
  void* mean;  // acc (images, channels)
};

// reduced = relu(w_reduce mean + offset), gate = sigmoid(w_expand reduced); and the affine map that applies it:
// factor = scale * gate, shift = factor * bias.
struct Gate {
  int64_t images, in_channels, reduced_channels, channels;
  Type type;             // of the tokens; everything here is acc
  const void* mean;      // (images, in_channels)
  const void* w_reduce;  // (reduced_channels, in_channels)
  const void* offset;    // (reduced_channels), or null
  const void* w_expand;  // transposed: (reduced_channels, channels)
  const void* bias;      // (channels), or null
  const void* scale;     // (images), or null
  void* reduced;         // (images, reduced_channels)
  void* gate;            // (images, channels)
  void* factor;          // (images, channels)
  void* shift;           // (images, channels), or null without bias
};

// output = residual + factor * input + shift, rounded once. `output` may be `input`, of the same type.
struct Affine {
  Extent extent;
  Type in_type, out_type;  // equal, or one of them Float and the other 16 bits wide
  const void* input;
  const void* factor;    // acc (images, channels)
  const void* shift;     // acc (images, channels), or null
  const void* residual;  // out_type, or null
  void* output;
};

// Token sums of grad and of grad * product.
struct ReduceGrad {
  Extent extent;
  Type grad_type, product_type;  // equal, or Float and 16 bits wide
  const void* grad;
  const void* product;
  void* sum;  // acc (images, channels)
  void* dot;  // acc (images, channels)
};

// From the token sums to the gradients of the gate's two matmuls and of what they were given.
struct GateBackward {
  int64_t images, tokens, reduced_channels, channels;
  Type type;
  const void* sum;       // (images, channels): of grad
  const void* dot;       // (images, channels): of grad * product
  const void* gate;      // (images, channels)
  const void* reduced;   // (images, reduced_channels)
  const void* w_reduce;  // (reduced_channels, channels)
  const void* w_expand;  // transposed: (reduced_channels, channels)
  const void* bias;      // (channels), or null
  const void* scale;     // (images), or null
  void* d_expanded;      // (images, channels): of the sigmoid's argument
  void* d_reduced;       // (images, reduced_channels): of the relu's argument
  void* factor;          // (images, channels): d_y = factor * grad + shift
  void* shift;           // (images, channels)
  void* d_bias;          // (images, channels): the token sum of d_y
  void* d_scale;         // (images)
};

// d_input = d_output * gelu'(input + bias), output = gelu(input + bias) once more, d_bias = the token sum of d_input.
// `d_input` may be `d_output`.
struct ActivateBackward {
  Extent extent;
  Type type;
  const void* input;
  const void* bias;  // acc (channels), or null
  const void* d_output;
  void* d_input;
  void* output;
  void* d_bias;  // acc (images, channels)
};

struct Passes {
  void (*activate)(const Activate&, void* stream);
  void (*token_mean)(const TokenMean&, void* stream);
  void (*gate)(const Gate&, void* stream);
  void (*affine)(const Affine&, void* stream);
  void (*reduce_grad)(const ReduceGrad&, void* stream);
  void (*gate_backward)(const GateBackward&, void* stream);
  void (*activate_backward)(const ActivateBackward&, void* stream);
};

const Passes& cpu_passes();
const Passes& cuda_passes();  // where the extension is built with nvcc

// Calls `run` with a null pointer to the C++ type that `type` names, among `Ts...`: float, double and the 16-bit ones.
template <class Half, class BFloat16, class F>
void with_type(Type type, F&& run) {
  switch (type) {
    case Type::Float: return run(static_cast<float*>(nullptr));
    case Type::Double: return run(static_cast<double*>(nullptr));
    case Type::Half: return run(static_cast<Half*>(nullptr));
    case Type::BFloat16: return run(static_cast<BFloat16*>(nullptr));
  }
}

// The same for two types: equal, or one of them float and the other 16 bits wide.
template <class Half, class BFloat16, class F>
void with_type_pair(Type a, Type b, F&& run) {
  with_type<Half, BFloat16>(a, [&]<class T>(T* first) {
    if (a == b) return run(first, first);
    if constexpr (std::is_same_v<T, float>) {
      with_type<Half, BFloat16>(b, [&]<class U>(U* second) {
        if constexpr (sizeof(U) == 2) run(first, second);
      });
    } else if constexpr (sizeof(T) == 2) {
      run(first, static_cast<float*>(nullptr));
    }
  });
}

}  // namespace t2t
