// The passes of a Performer token layer over its tokens (arXiv 2101.11986, section 3.1), on the CPU.
//
// With phi(z) = exp(w z - |z|^2 / 2) / sqrt(m), S = sum of phi(k) and A = sum of phi(k) v^T over an image's tokens:
//   p = phi(q) / (phi(q) . S + eps),  y = v + mask1 (p (A P^T) + b),
//   out = y + mask2 (F2 gelu(F1 LayerNorm(y) + b1) + b2)
// Tokens are float32 or 16 bits wide; all else, and all arithmetic, is float32.
#pragma once

#include <cstdint>

namespace t2t {

enum class Width { Float, Half, BFloat16 };

// Arrays are contiguous; images are worked on in `parts` shares of their tokens.
struct TokenLayer {
  int64_t images, tokens, channels, features, hidden, parts;
  Width width;
  float eps, norm_eps;
  const void* kqv;      // (images, tokens, 3 channels)
  const float* w;       // (features, channels)
  const float* proj_bias;
  const float* norm_weight;
  const float* norm_bias;
  const float* fc1_weight;  // (hidden, channels)
  const float* fc1_bias;
  const float* fc2_weight;  // (channels, hidden)
  const float* fc2_bias;
  const void* proj_mask;  // (images, tokens, channels), or null
  const void* mlp_mask;
};

// What attention needs of the keys and values: S and A of each part.
struct Summaries {
  float* total;    // (images, parts, features)
  float* summary;  // (images, parts, features, channels)
};

// The same of all tokens, and A P^T.
struct Attended {
  const float* total;      // (images, features)
  const float* projected;  // (images, features, channels)
};

// Gradients of the parameters, one set for each share of the work.
struct LayerGrads {
  int64_t slots;
  float* w;  // (slots, features, channels), or null
  float* proj_bias;
  float* norm_weight;
  float* norm_bias;
  float* fc1_weight;
  float* fc1_bias;
  float* fc2_weight;
  float* fc2_bias;
};

// From the gradient of the output to those of the queries and of y, which is also the values'; and what the keys need:
// along = sum of (dp . p) p and the gradient of A P^T, of each part.
struct QueriesBackward {
  const void* grad;   // (images, tokens, channels)
  void* d_kqv;        // its queries are written
  float* dy;          // (images, tokens, channels)
  float* along;       // (images, parts, features)
  float* d_projected;  // (images, parts, features, channels)
};

// Then those of keys and values.
struct KeysBackward {
  const float* dy;
  const float* along;      // (images, features)
  const float* d_summary;  // (images, features, channels)
  void* d_kqv;             // its keys and values are written
};

void summarize(const TokenLayer& layer, const Summaries& to);
void respond(const TokenLayer& layer, const Attended& attended, void* output);
void queries_backward(const TokenLayer& layer, const Attended& attended, const QueriesBackward& grads,
                      const LayerGrads& sums);
void keys_backward(const TokenLayer& layer, const KeysBackward& grads, const LayerGrads& sums);

}  // namespace t2t
