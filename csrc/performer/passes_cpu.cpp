// See passes.h. Tokens are taken in blocks, each carried through its whole chain of matmuls in the cache.
// Columns beyond the last channel or feature are zero in every matrix here.
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include "../cpu/blocks.h"
#include "../cpu/math.h"
#include "passes.h"

namespace t2t {
namespace {

constexpr int64_t kTokens = 8 * kRows;  // of a block

template <class F>
void with_width(Width width, F&& run) {
  if (width == Width::Float) return run(static_cast<float*>(nullptr));
  if (width == Width::Half) return run(static_cast<c10::Half*>(nullptr));
  run(static_cast<c10::BFloat16*>(nullptr));
}

// run(column) for the first of each vector of a row.
template <class F>
inline void for_columns(int64_t width, F&& run) {
  for (int64_t column = 0; column < width; column += kLanes) run(column);
}

// Accumulates f(column), a vector each, over a row.
template <class F>
inline float sum_columns(int64_t width, F&& f) {
  Vector sums(0.0f);
  for_columns(width, [&](int64_t column) { sums = sums + f(column); });
  return sum(sums);
}

Vector vector_at(const float* row, int64_t column) { return Vector::loadu(row + column); }

// out = `in` (rows, columns) with zeros up to its stride; or its transpose, each value times `factor`.
void pad(const float* in, int64_t rows, int64_t columns, const Matrix& out) {
  for (int64_t row = 0; row < rows; ++row) {
    std::copy(in + row * columns, in + (row + 1) * columns, out.row(row));
    std::fill(out.row(row) + columns, out.row(row + 1), 0.0f);
  }
}

void pad_transposed(const float* in, int64_t rows, int64_t columns, const Matrix& out, float factor = 1.0f) {
  for (int64_t column = 0; column < columns; ++column) {
    for (int64_t row = 0; row < rows; ++row) out.row(column)[row] = factor * in[row * columns + column];
    std::fill(out.row(column) + rows, out.row(column + 1), 0.0f);
  }
}

// to += the column sums of `rows`.
void add_column_sums(const Matrix& rows, int64_t count, int64_t columns, float* to) {
  for (int64_t row = 0; row < count; ++row) {
    for (int64_t column = 0; column < columns; ++column) to[column] += rows.row(row)[column];
  }
}

// The layer's sizes, rounded up to what matmuls take, and its weights in their order.
struct Weights {
  explicit Weights(const TokenLayer& layer)
      : layer(layer),
        width(round_up(layer.channels, kLanes)),
        features(round_up(layer.features, kLanes)),
        hidden(round_up(layer.hidden, kLanes)) {
    scratch.lay_out([&] {
      w_across = scratch.take(layer.channels, row_stride(features));
      fc1_across = scratch.take(layer.channels, row_stride(hidden));
      fc2_across = scratch.take(layer.hidden, row_stride(width));
      w = scratch.take(layer.features, row_stride(width));
      fc1 = scratch.take(layer.hidden, row_stride(width));
      fc2 = scratch.take(layer.channels, row_stride(hidden));
      vectors = scratch.take(5, std::max(width, hidden));
      no_feature = scratch.take(1, features).data;
      channel = scratch.take(1, width).data;
    });
    pad_transposed(layer.w, layer.features, layer.channels, w_across, kLog2E);
    pad_transposed(layer.fc1_weight, layer.hidden, layer.channels, fc1_across);
    pad_transposed(layer.fc2_weight, layer.channels, layer.hidden, fc2_across);
    pad(layer.w, layer.features, layer.channels, w);
    pad(layer.fc1_weight, layer.hidden, layer.channels, fc1);
    pad(layer.fc2_weight, layer.channels, layer.hidden, fc2);
    const float* rows[] = {layer.proj_bias, layer.norm_weight, layer.norm_bias, layer.fc2_bias};
    for (int i = 0; i < 4; ++i) pad(rows[i], 1, layer.channels, {vectors.row(i), vectors.stride});
    pad(layer.fc1_bias, 1, layer.hidden, {vectors.row(4), vectors.stride});
    std::fill(no_feature, no_feature + layer.features, 0.0f);
    std::fill(no_feature + layer.features, no_feature + features, kNothing);
    std::fill(channel, channel + layer.channels, 1.0f);
    std::fill(channel + layer.channels, channel + width, 0.0f);
  }

  const float* proj_bias() const { return vectors.row(0); }
  const float* norm_weight() const { return vectors.row(1); }
  const float* norm_bias() const { return vectors.row(2); }
  const float* fc2_bias() const { return vectors.row(3); }
  const float* fc1_bias() const { return vectors.row(4); }

  const TokenLayer& layer;
  int64_t width, features, hidden;
  Scratch scratch;
  Matrix w_across, fc1_across, fc2_across, w, fc1, fc2, vectors;
  float *no_feature;  // 0 for each feature, -infinity beyond
  float *channel;     // 1 for each channel, 0 beyond
};

// What the passes of a thread share: a block of tokens and its features.
template <class T>
struct Block {
  explicit Block(const Weights& weights) : s(weights), layer(weights.layer) {}

  // Matrices over the tokens of a block.
  Matrix over_channels() { return scratch.take(kTokens, row_stride(s.width)); }
  Matrix over_features() { return scratch.take(kTokens, row_stride(s.features)); }
  Matrix over_hidden() { return scratch.take(kTokens, row_stride(s.hidden)); }
  Matrix across(int64_t columns) { return scratch.take(round_up(columns, kRows), row_stride(kTokens)); }

  // run() for each block of a part of an image's tokens.
  template <class F>
  void for_blocks(int64_t image_, int64_t part, F&& run) {
    image = image_;
    const int64_t blocks = (layer.tokens + kTokens - 1) / kTokens;
    for (int64_t block = blocks * part / layer.parts; block < blocks * (part + 1) / layer.parts; ++block) {
      first = block * kTokens;
      count = std::min(kTokens, layer.tokens - first);
      height = round_up(count, kRows);
      run();
    }
  }

  // Rows of an array (images, tokens, `columns`) from column `at` on; zeros below them.
  template <class U>
  void load(const void* array, int64_t columns, int64_t at, const Matrix& to) const {
    const U* from = static_cast<const U*>(array) + (image * layer.tokens + first) * columns + at;
    for (int64_t row = 0; row < height; ++row) {
      const int64_t valid = row < count ? layer.channels : 0;
      if (valid > 0) at::vec::convert(from + row * columns, to.row(row), valid);
      std::fill(to.row(row) + valid, to.row(row + 1), 0.0f);
    }
  }

  template <class U>
  void store(const Matrix& from, void* array, int64_t columns, int64_t at) const {
    U* to = static_cast<U*>(array) + (image * layer.tokens + first) * columns + at;
    for (int64_t row = 0; row < count; ++row) at::vec::convert(from.row(row), to + row * columns, layer.channels);
  }

  // phi(z), zero beyond the last feature.
  void map(const Matrix& z, const Matrix& phi) {
    const float half_log = 0.5f * std::log2(static_cast<float>(layer.features));
    float shifts[kTokens];
    for (int64_t row = 0; row < height; ++row) {
      const float* values = z.row(row);
      const float square = sum_columns(s.width, [&](int64_t c) { return vector_at(values, c) * vector_at(values, c); });
      shifts[row] = -0.5f * kLog2E * square - half_log;
    }
    multiply<Float32>(
        z, s.w_across, height, s.features, layer.channels,
        [&](int64_t row, int64_t column) { return Vector(shifts[row]) + vector_at(s.no_feature, column); },
        [&]<int C>(int64_t row, int64_t column, const Vector (&sums)[C]) {
#pragma GCC unroll 4
          for (int c = 0; c < C; ++c) power_of_two(sums[c]).store(phi.row(row) + column + c * kLanes);
        });
  }

  // to (columns, channels or hidden) += from^T b, over the tokens of the block.
  void add_outer(const Matrix& from, int64_t columns, const Matrix& room, const Matrix& b, int64_t width,
                 const Matrix& to) {
    transpose(from.data, from.stride, height, columns, room);
    multiply_to<Float32>(to, room, b, round_up(columns, kRows), width, height, true);
  }

  const Weights& s;
  const TokenLayer& layer;
  Scratch scratch;
  int64_t image = 0, first = 0, count = 0, height = 0;
};

// A matrix with room for whole tiles of rows.
Matrix take_rows(Scratch& scratch, int64_t rows, int64_t columns) {
  return scratch.take(round_up(rows, kRows), row_stride(round_up(columns, kLanes)));
}

void clear(const Matrix& matrix, int64_t rows) { std::fill(matrix.data, matrix.row(round_up(rows, kRows)), 0.0f); }

// to (rows, columns) = or += the rows of `from`.
void unpad(const Matrix& from, int64_t rows, int64_t columns, float* to, bool add = false) {
  for (int64_t row = 0; row < rows; ++row) {
    float* line = to + row * columns;
    for (int64_t c = 0; c < columns; ++c) line[c] = from.row(row)[c] + (add ? line[c] : 0.0f);
  }
}

template <class T>
struct Summary : Block<T> {
  explicit Summary(const Weights& weights) : Block<T>(weights) {
    scratch.lay_out([&] {
      k = this->over_channels();
      v = this->over_channels();
      phi = this->over_features();
      phi_across = this->across(layer.features);
      sums = take_rows(scratch, layer.features, layer.channels);
      total = scratch.take(1, s.features).data;
    });
  }

  void run(int64_t image, int64_t part, const Summaries& to) {
    clear(sums, layer.features);
    std::fill(total, total + s.features, 0.0f);
    this->for_blocks(image, part, [&] {
      this->template load<T>(layer.kqv, 3 * layer.channels, 0, k);
      this->template load<T>(layer.kqv, 3 * layer.channels, 2 * layer.channels, v);
      this->map(k, phi);
      add_column_sums(phi, this->count, layer.features, total);
      this->add_outer(phi, layer.features, phi_across, v, s.width, sums);
    });
    const int64_t at = image * layer.parts + part;
    std::copy(total, total + layer.features, to.total + at * layer.features);
    unpad(sums, layer.features, layer.channels, to.summary + at * layer.features * layer.channels);
  }

  using Block<T>::s;
  using Block<T>::layer;
  using Block<T>::scratch;
  Matrix k, v, phi, phi_across, sums;
  float* total;
};

// The layer behind the attention, for a block of queries.
template <class T>
struct Response : Block<T> {
  explicit Response(const Weights& weights) : Block<T>(weights) {
    scratch.lay_out([&] { take(); });
  }

  void take() {
    q = this->over_channels();
    y = this->over_channels();
    normed = this->over_channels();
    mask = this->over_channels();
    p = this->over_features();
    hidden = this->over_hidden();
    projected = scratch.take(layer.features, row_stride(s.width));
    total = scratch.take(1, s.features).data;
  }

  void start(int64_t image, const Attended& attended) {
    pad(attended.projected + image * layer.features * layer.channels, layer.features, layer.channels, projected);
    pad(attended.total + image * layer.features, 1, layer.features, {total, s.features});
  }

  void run(int64_t image, int64_t part, void* output) {
    this->for_blocks(image, part, [&] {
      attend();
      for (int64_t row = 0; row < this->height; ++row) {
        standardize(row);
        scale_and_shift(row);
      }
      activate([](int64_t, int64_t, const Vector& before) { return gelu(before); });
      if (layer.mlp_mask != nullptr) this->template load<T>(layer.mlp_mask, layer.channels, 0, mask);
      multiply<Float32>(
          hidden, s.fc2_across, this->height, s.width, layer.hidden,
          [&](int64_t, int64_t column) { return vector_at(s.fc2_bias(), column); },
          [&]<int C>(int64_t row, int64_t column, const Vector (&sums)[C]) {
            add_masked<C>(layer.mlp_mask, row, column, sums);
          });
      this->template store<T>(y, output, layer.channels, 0);
    });
  }

  // y, from the queries and values of the block; p stays.
  void attend() {
    this->template load<T>(layer.kqv, 3 * layer.channels, layer.channels, q);
    this->template load<T>(layer.kqv, 3 * layer.channels, 2 * layer.channels, y);
    this->map(q, p);
    for (int64_t row = 0; row < this->height; ++row) {
      float* line = p.row(row);
      const float sum = sum_columns(s.features, [&](int64_t c) { return vector_at(line, c) * vector_at(total, c); });
      const Vector denominator(sum + layer.eps);
      for_columns(s.features, [&](int64_t c) { (vector_at(line, c) / denominator).store(line + c); });
    }
    if (layer.proj_mask != nullptr) this->template load<T>(layer.proj_mask, layer.channels, 0, mask);
    multiply<Float32>(
        p, projected, this->height, s.width, layer.features,
        [&](int64_t, int64_t column) { return vector_at(s.proj_bias(), column); },
        [&]<int C>(int64_t row, int64_t column, const Vector (&sums)[C]) {
          add_masked<C>(layer.proj_mask, row, column, sums);
        });
  }

  // y += mask sums.
  template <int C>
  void add_masked(const void* masked, int64_t row, int64_t column, const Vector (&sums)[C]) {
    float* line = y.row(row) + column;
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      const Vector value = masked == nullptr ? sums[c] : sums[c] * vector_at(mask.row(row), column + c * kLanes);
      (vector_at(line, c * kLanes) + value).store(line + c * kLanes);
    }
  }

  // normed = (y - mean) / deviation; returns 1 / deviation.
  float standardize(int64_t row) {
    const float *from = y.row(row), share = 1.0f / layer.channels;
    float* to = normed.row(row);
    const Vector mean(sum_columns(s.width, [&](int64_t c) { return vector_at(from, c); }) * share);
    for_columns(s.width, [&](int64_t c) { ((vector_at(from, c) - mean) * vector_at(s.channel, c)).store(to + c); });
    const float variance = sum_columns(s.width, [&](int64_t c) { return vector_at(to, c) * vector_at(to, c); }) * share;
    const float rstd = 1.0f / std::sqrt(variance + layer.norm_eps);
    for_columns(s.width, [&](int64_t c) { (vector_at(to, c) * Vector(rstd)).store(to + c); });
    return rstd;
  }

  void scale_and_shift(int64_t row) {
    float* line = normed.row(row);
    for_columns(s.width, [&](int64_t c) {
      at::vec::fmadd(vector_at(line, c), vector_at(s.norm_weight(), c), vector_at(s.norm_bias(), c)).store(line + c);
    });
  }

  // hidden = activation(row, column, F1 normed + b1).
  template <class F>
  void activate(F&& activation) {
    multiply<Float32>(
        normed, s.fc1_across, this->height, s.hidden, layer.channels,
        [&](int64_t, int64_t column) { return vector_at(s.fc1_bias(), column); },
        [&]<int C>(int64_t row, int64_t column, const Vector (&sums)[C]) {
#pragma GCC unroll 4
          for (int c = 0; c < C; ++c) {
            activation(row, column + c * kLanes, sums[c]).store(hidden.row(row) + column + c * kLanes);
          }
        });
  }

  using Block<T>::s;
  using Block<T>::layer;
  using Block<T>::scratch;
  Matrix q, y, normed, mask, p, hidden, projected;
  float* total;
};

}  // namespace
}  // namespace t2t

#include "backward_cpu.h"

namespace t2t {
namespace {

// run(pass, image, part) for all parts of all images, on all threads.
template <template <class> class Pass, class F>
void for_parts(const TokenLayer& layer, F&& run) {
  const Weights weights(layer);
  with_width(layer.width, [&]<class T>(T*) {
    const int64_t tokens = std::max<int64_t>(1, layer.tokens / layer.parts);
    at::parallel_for(0, layer.images * layer.parts, std::max<int64_t>(1, 2 * kTokens / tokens),
                     [&](int64_t begin, int64_t end) {
                       Pass<T> pass(weights);
                       for (int64_t task = begin; task < end; ++task) run(pass, task / layer.parts, task % layer.parts);
                     });
  });
}

// The same in shares, each by one thread and in one order, for passes that sum up gradients of the weights.
template <template <class> class Pass, class F>
void for_slots(const TokenLayer& layer, const LayerGrads& sums, F&& run) {
  const Weights weights(layer);
  const int64_t tasks = layer.images * layer.parts;
  with_width(layer.width, [&]<class T>(T*) {
    at::parallel_for(0, sums.slots, 1, [&](int64_t begin, int64_t end) {
      for (int64_t slot = begin; slot < end; ++slot) {
        Pass<T> pass(weights);
        for (int64_t task = tasks * slot / sums.slots; task < tasks * (slot + 1) / sums.slots; ++task) {
          run(pass, task / layer.parts, task % layer.parts);
        }
        pass.finish(slot, sums);
      }
    });
  });
}

}  // namespace

void summarize(const TokenLayer& layer, const Summaries& to) {
  for_parts<Summary>(layer, [&](auto& pass, int64_t image, int64_t part) { pass.run(image, part, to); });
}

void respond(const TokenLayer& layer, const Attended& attended, void* output) {
  for_parts<Response>(layer, [&](auto& pass, int64_t image, int64_t part) {
    pass.start(image, attended);
    pass.run(image, part, output);
  });
}

void queries_backward(const TokenLayer& layer, const Attended& attended, const QueriesBackward& grads,
                      const LayerGrads& sums) {
  for_slots<QueriesPass>(layer, sums, [&](auto& pass, int64_t image, int64_t part) {
    pass.run(image, part, attended, grads, sums.w != nullptr);
  });
}

void keys_backward(const TokenLayer& layer, const KeysBackward& grads, const LayerGrads& sums) {
  for_slots<KeysPass>(layer, sums, [&](auto& pass, int64_t image, int64_t part) {
    pass.run(image, part, grads, sums.w != nullptr);
  });
}

}  // namespace t2t
