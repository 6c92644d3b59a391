// The passes of backward: see passes.h. Included by passes_cpu.cpp alone, behind what it builds on.
#pragma once

namespace t2t {
namespace {

// With h = F1 normed + b1 and the gradient g of the output:
//   dh = F2^T (mask2 g) gelu'(h)   dy = g + LayerNorm'(F1^T dh)   dp = (mask1 dy) (A P^T)^T
//   and for the exponents of phi(q), in which the denominator cancels, de = p (dp - (dp . p) S):  dq = de w - q sum(de)
template <class T>
struct QueriesPass : Response<T> {
  explicit QueriesPass(const Weights& weights) : Response<T>(weights) {
    more.lay_out([&] {
      grad = more.take(kTokens, row_stride(s.width));
      dy = more.take(kTokens, row_stride(s.width));
      masked = more.take(kTokens, row_stride(s.width));
      normal = more.take(kTokens, row_stride(s.width));
      d_hidden = more.take(kTokens, row_stride(s.hidden));
      dp = more.take(kTokens, row_stride(s.features));
      room = more.take(round_up(std::max({layer.channels, layer.features, layer.hidden}), kRows), row_stride(kTokens));
      projected_across = more.take(layer.channels, row_stride(s.features));
      d_projected = take_rows(more, layer.features, layer.channels);
      d_w = take_rows(more, layer.features, layer.channels);
      d_fc1 = take_rows(more, layer.hidden, layer.channels);
      d_fc2 = take_rows(more, layer.channels, layer.hidden);
      d_vectors = more.take(5, std::max(s.width, s.hidden));
      along = more.take(1, s.features).data;
    });
    clear(d_w, layer.features);
    clear(d_fc1, layer.hidden);
    clear(d_fc2, layer.channels);
    std::fill(d_vectors.data, d_vectors.row(5), 0.0f);
  }

  void run(int64_t image, int64_t part, const Attended& attended, const QueriesBackward& to, bool needs_w) {
    this->start(image, attended);
    pad_transposed(attended.projected + image * layer.features * layer.channels, layer.features, layer.channels,
                   projected_across);
    clear(d_projected, layer.features);
    std::fill(along, along + s.features, 0.0f);
    this->for_blocks(image, part, [&] {
      this->attend();
      this->template load<T>(to.grad, layer.channels, 0, grad);
      differentiate_mlp();
      this->template store<float>(dy, to.dy, layer.channels, 0);
      mask_by(layer.proj_mask, dy);
      add_column_sums(masked, this->height, layer.channels, d_vectors.row(0));
      this->add_outer(this->p, layer.features, room, masked, s.width, d_projected);
      multiply_to<Float32>(dp, masked, projected_across, this->height, s.features, layer.channels, false);
      differentiate_features(needs_w);
      this->template store<T>(dy, to.d_kqv, 3 * layer.channels, layer.channels);
    });
    const int64_t at = image * layer.parts + part;
    std::copy(along, along + layer.features, to.along + at * layer.features);
    unpad(d_projected, layer.features, layer.channels, to.d_projected + at * layer.features * layer.channels);
  }

  void finish(int64_t slot, const LayerGrads& to) {
    const int64_t channels = layer.channels, hidden = layer.hidden;
    float* rows[] = {to.proj_bias, to.norm_weight, to.norm_bias, to.fc2_bias};
    for (int i = 0; i < 4; ++i) std::copy(d_vectors.row(i), d_vectors.row(i) + channels, rows[i] + slot * channels);
    std::copy(d_vectors.row(4), d_vectors.row(4) + hidden, to.fc1_bias + slot * hidden);
    unpad(d_fc1, hidden, channels, to.fc1_weight + slot * hidden * channels);
    unpad(d_fc2, channels, hidden, to.fc2_weight + slot * hidden * channels);
    if (to.w != nullptr) unpad(d_w, layer.features, channels, to.w + slot * layer.features * channels);
  }

 private:
  // dy, and the gradients of the MLP's weights and of the LayerNorm's.
  void differentiate_mlp() {
    float rstd[kTokens];
    for (int64_t row = 0; row < this->height; ++row) {
      rstd[row] = this->standardize(row);
      std::copy(this->normed.row(row), this->normed.row(row + 1), normal.row(row));
      this->scale_and_shift(row);
    }
    this->activate([&](int64_t row, int64_t column, const Vector& before) {
      Vector value(0.0f), slope(0.0f);
      gelu_with_slope(before, value, slope);
      slope.store(d_hidden.row(row) + column);
      return value;
    });
    mask_by(layer.mlp_mask, grad);
    add_column_sums(masked, this->height, layer.channels, d_vectors.row(3));
    this->add_outer(masked, layer.channels, room, this->hidden, s.hidden, d_fc2);
    multiply<Float32>(
        masked, s.fc2, this->height, s.hidden, layer.channels, [](int64_t, int64_t) { return Vector(0.0f); },
        [&]<int C>(int64_t row, int64_t column, const Vector (&sums)[C]) {
#pragma GCC unroll 4
          for (int c = 0; c < C; ++c) {
            float* slope = d_hidden.row(row) + column + c * kLanes;
            (sums[c] * Vector::loadu(slope)).store(slope);
          }
        });
    add_column_sums(d_hidden, this->height, layer.hidden, d_vectors.row(4));
    this->add_outer(d_hidden, layer.hidden, room, this->normed, s.width, d_fc1);
    multiply_to<Float32>(dy, d_hidden, s.fc1, this->height, s.width, layer.hidden, false);
    for (int64_t row = 0; row < this->height; ++row) differentiate_norm(row, rstd[row]);
  }

  // dy of a row, from the gradient of its LayerNorm's result.
  void differentiate_norm(int64_t row, float rstd) {
    float *line = dy.row(row), *d_weight = d_vectors.row(1), *d_bias = d_vectors.row(2);
    const float *z = normal.row(row), *from = grad.row(row), share = 1.0f / layer.channels;
    for_columns(s.width, [&](int64_t c) {
      const Vector value = vector_at(line, c);
      at::vec::fmadd(value, vector_at(z, c), vector_at(d_weight, c)).store(d_weight + c);
      (vector_at(d_bias, c) + value).store(d_bias + c);
      (value * vector_at(s.norm_weight(), c)).store(line + c);
    });
    const Vector mean(sum_columns(s.width, [&](int64_t c) { return vector_at(line, c); }) * share);
    const Vector slope(sum_columns(s.width, [&](int64_t c) { return vector_at(line, c) * vector_at(z, c); }) * share);
    for_columns(s.width, [&](int64_t c) {
      const Vector inner = (vector_at(line, c) - mean - vector_at(z, c) * slope) * vector_at(s.channel, c);
      at::vec::fmadd(inner, Vector(rstd), vector_at(from, c)).store(line + c);
    });
  }

  // dq in place of dy, and `along`.
  void differentiate_features(bool needs_w) {
    float sums[kTokens];
    for (int64_t row = 0; row < this->height; ++row) {
      float* line = dp.row(row);
      const float* weights = this->p.row(row);
      const auto product = [&](int64_t c) { return vector_at(line, c) * vector_at(weights, c); };
      const Vector share(sum_columns(s.features, product));
      sums[row] = sum_columns(s.features, [&](int64_t c) {
        at::vec::fmadd(share, vector_at(weights, c), vector_at(along, c)).store(along + c);
        const Vector value = (vector_at(line, c) - share * vector_at(this->total, c)) * vector_at(weights, c);
        value.store(line + c);
        return value;
      });
    }
    if (needs_w) this->add_outer(dp, layer.features, room, this->q, s.width, d_w);
    multiply<Float32>(
        dp, s.w, this->height, s.width, layer.features,
        [&](int64_t row, int64_t column) { return vector_at(this->q.row(row), column) * Vector(-sums[row]); },
        [&]<int C>(int64_t row, int64_t column, const Vector (&values)[C]) {
#pragma GCC unroll 4
          for (int c = 0; c < C; ++c) values[c].store(dy.row(row) + column + c * kLanes);
        });
  }

  // masked = mask * rows.
  void mask_by(const void* mask, const Matrix& rows) {
    if (mask != nullptr) this->template load<T>(mask, layer.channels, 0, this->mask);
    for (int64_t row = 0; row < this->height; ++row) {
      for_columns(s.width, [&](int64_t c) {
        const Vector value = vector_at(rows.row(row), c);
        (mask == nullptr ? value : value * vector_at(this->mask.row(row), c)).store(masked.row(row) + c);
      });
    }
  }

  using Block<T>::s;
  using Block<T>::layer;
  Scratch more;
  Matrix grad, dy, masked, normal, d_hidden, dp, room, projected_across, d_projected, d_w, d_fc1, d_fc2;
  Matrix d_vectors;  // of the projection's bias, the LayerNorm's weight and bias, b2 and b1
  float* along;
};

// With R = sum of (dp . p) p over the queries, for the exponents of phi(k) de = phi(k) (v dA^T - R):
//   dk = de w - k sum(de)   dv = dy + phi(k) dA
template <class T>
struct KeysPass : Block<T> {
  explicit KeysPass(const Weights& weights) : Block<T>(weights) {
    scratch.lay_out([&] {
      k = this->over_channels();
      v = this->over_channels();
      result = this->over_channels();
      phi = this->over_features();
      d_exponent = this->over_features();
      room = this->across(layer.features);
      d_summary = scratch.take(layer.features, row_stride(s.width));
      d_summary_across = scratch.take(layer.channels, row_stride(s.features));
      d_w = take_rows(scratch, layer.features, layer.channels);
      along = scratch.take(1, s.features).data;
    });
    clear(d_w, layer.features);
  }

  void run(int64_t image, int64_t part, const KeysBackward& from, bool needs_w) {
    const float* gradient = from.d_summary + image * layer.features * layer.channels;
    pad(gradient, layer.features, layer.channels, d_summary);
    pad_transposed(gradient, layer.features, layer.channels, d_summary_across);
    pad(from.along + image * layer.features, 1, layer.features, {along, s.features});
    this->for_blocks(image, part, [&] {
      this->template load<T>(layer.kqv, 3 * layer.channels, 0, k);
      this->template load<T>(layer.kqv, 3 * layer.channels, 2 * layer.channels, v);
      this->map(k, phi);
      multiply<Float32>(
          v, d_summary_across, this->height, s.features, layer.channels,
          [&](int64_t, int64_t column) { return Vector(0.0f) - Vector::loadu(along + column); },
          [&]<int C>(int64_t row, int64_t column, const Vector (&sums)[C]) {
#pragma GCC unroll 4
            for (int c = 0; c < C; ++c) {
              const int64_t at = column + c * kLanes;
              (sums[c] * Vector::loadu(phi.row(row) + at)).store(d_exponent.row(row) + at);
            }
          });
      if (needs_w) this->add_outer(d_exponent, layer.features, room, k, s.width, d_w);
      float sums[kTokens];
      for (int64_t row = 0; row < this->height; ++row) {
        sums[row] = sum_columns(s.features, [&](int64_t c) { return Vector::loadu(d_exponent.row(row) + c); });
      }
      multiply<Float32>(
          d_exponent, s.w, this->height, s.width, layer.features,
          [&](int64_t row, int64_t column) { return Vector::loadu(k.row(row) + column) * Vector(-sums[row]); },
          [&]<int C>(int64_t row, int64_t column, const Vector (&values)[C]) {
#pragma GCC unroll 4
            for (int c = 0; c < C; ++c) values[c].store(result.row(row) + column + c * kLanes);
          });
      this->template store<T>(result, from.d_kqv, 3 * layer.channels, 0);
      this->template load<float>(from.dy, layer.channels, 0, result);
      multiply_to<Float32>(result, phi, d_summary, this->height, s.width, layer.features, true);
      this->template store<T>(result, from.d_kqv, 3 * layer.channels, 2 * layer.channels);
    });
  }

  void finish(int64_t slot, const LayerGrads& to) {
    if (to.w == nullptr) return;
    unpad(d_w, layer.features, layer.channels, to.w + slot * layer.features * layer.channels, true);
  }

  using Block<T>::s;
  using Block<T>::layer;
  using Block<T>::scratch;
  Matrix k, v, result, phi, d_exponent, room, d_summary, d_summary_across, d_w;
  float* along;
};

}  // namespace
}  // namespace t2t
