// Attention backward: see kernels.h. For a block of keys, the weights of a block of queries once more, and their
// gradients: with P = exp(scale Q K^T - lse), dP = dO V^T and dS = P (dP - rowsum(dO O)),
// dV += P^T dO, dK += scale dS^T Q, dQ += scale dS K. Weights are kept transposed, keys in rows.
#pragma once

#include "../cpu/blocks.h"
#include "tokens.h"

namespace t2t {
namespace {

constexpr int64_t kKeyRows = 8 * kRows;      // of a block; an even number
constexpr int64_t kQueryColumns = 256;       // of a block, at most

template <class Format>
class Backward {
 public:
  explicit Backward(const AttendBackward& arguments)
      : a_(arguments),
        units_(Format::units(a_.channels)),
        width_(round_up(a_.channels, kLanes)),
        blocks_((a_.queries_count + kQueryColumns - 1) / kQueryColumns),
        queries_(round_up((a_.queries_count + blocks_ - 1) / blocks_, kLanes * Format::kPerUnit)) {}

  void run() const {
    const int64_t heads = a_.images * a_.heads, blocks = (a_.keys_count + kKeyRows - 1) / kKeyRows;
    at::parallel_for(0, heads * a_.parts, 1, [&](int64_t begin, int64_t end) {
      Work work(*this);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t head = task / a_.parts, part = task % a_.parts;
        work.pack(head);
        for (int64_t block = blocks * part / a_.parts; block < blocks * (part + 1) / a_.parts; ++block) {
          work.differentiate(block * kKeyRows);
        }
        work.finish(part);
      }
    });
    if (a_.parts > 1) add_parts();
  }

 private:
  struct Work;

  // d_queries from the sums that the parts of a head have left in `partial`.
  void add_parts() const {
    const int64_t tokens = a_.images * a_.heads * a_.queries_count;
    at::parallel_for(0, tokens, 64, [&](int64_t begin, int64_t end) {
      for (int64_t token = begin; token < end; ++token) {
        float* sums = a_.partial + token * a_.channels;
        for (int64_t part = 1; part < a_.parts; ++part) {
          const float* others = sums + part * tokens * a_.channels;
          for (int64_t c = 0; c < a_.channels; ++c) sums[c] += others[c];
        }
        const Tokens<Format> out(a_, a_.d_queries, token / a_.queries_count);
        out.write(token % a_.queries_count, sums, 1.0f);
      }
    });
  }

  const AttendBackward& a_;
  int64_t units_, width_;     // of a token's channels
  int64_t blocks_, queries_;  // blocks of queries, and queries in each
};

// What a thread holds: a head's queries and gradients, packed, and a block of keys with its results.
template <class Format>
struct Backward<Format>::Work {
  explicit Work(const Backward& backward) : f(backward) {
    const int64_t all = f.blocks_ * f.queries_, narrow = row_stride(f.width_), wide = row_stride(f.queries_);
    scratch.lay_out([&] {
      queries = scratch.take(all / Format::kPerUnit, narrow);
      grads = scratch.take(all / Format::kPerUnit, narrow);
      queries_across = scratch.take(f.blocks_ * f.units_, wide);
      grads_across = scratch.take(f.blocks_ * f.units_, wide);
      d_queries = scratch.take(all + kRows, narrow);  // a tile may reach beyond the last
      keys = scratch.take(std::max(kKeyRows, f.queries_), f.units_);
      values = scratch.take(kKeyRows, f.units_);
      packed_keys = scratch.take(kKeyRows / Format::kPerUnit, narrow);
      weights = scratch.take(kKeyRows, wide);
      d_weights = scratch.take(kKeyRows, wide);
      paired = scratch.take(kKeyRows / Format::kPerUnit, wide);
      d_scores = scratch.take(round_up(wide, kRows), row_stride(kKeyRows / Format::kPerUnit));
      d_keys = scratch.take(kKeyRows, narrow);
      d_values = scratch.take(kKeyRows, narrow);
      lse = scratch.take(1, all).data;
      along = scratch.take(1, all).data;
    });
  }

  Matrix rows_of(const Matrix& packed, int64_t block) const {
    return {packed.row(block * f.queries_ / Format::kPerUnit), packed.stride};
  }
  Matrix across_of(const Matrix& packed, int64_t block) const { return {packed.row(block * f.units_), packed.stride}; }

  void pack(int64_t head_) {
    std::fill(d_queries.data, d_queries.row(f.blocks_ * f.queries_ + kRows), 0.0f);
    if (head == head_) return;
    head = head_;
    const Tokens<Format> q(f.a_, f.a_.queries, head), grad(f.a_, f.a_.grad, head), out(f.a_, f.a_.output, head);
    for (int64_t block = 0; block < f.blocks_; ++block) {
      const int64_t first = block * f.queries_;
      const int64_t count = std::clamp<int64_t>(f.a_.queries_count - first, 0, f.queries_);
      q.transpose(first, count, across_of(queries_across, block), keys);
      grad.transpose(first, count, across_of(grads_across, block), keys);
      q.pack(first, count, rows_of(queries, block), f.queries_ / Format::kPerUnit);
      grad.pack(first, count, rows_of(grads, block), f.queries_ / Format::kPerUnit);
    }
    std::fill(lse, lse + f.blocks_ * f.queries_, 0.0f);
    std::fill(along, along + f.blocks_ * f.queries_, 0.0f);
    for (int64_t query = 0; query < f.a_.queries_count; ++query) {
      lse[query] = f.a_.lse[head * f.a_.queries_count + query] * kLog2E;
      const auto *a = grad.token(query), *b = out.token(query);
      for (int64_t c = 0; c < f.a_.channels; ++c) along[query] += Format::value(a[c]) * Format::value(b[c]);
    }
  }

  // The gradients of up to kKeyRows keys and values from `first` on, and their part in those of the queries.
  void differentiate(int64_t first) {
    const int64_t count = std::min(kKeyRows, f.a_.keys_count - first);
    const int64_t height = round_up(count, kRows), depth = f.queries_ / Format::kPerUnit;
    const Tokens<Format> k(f.a_, f.a_.keys, head), v(f.a_, f.a_.values, head);
    k.copy(first, count, keys, height);
    v.copy(first, count, values, height);
    k.pack(first, count, packed_keys, kKeyRows / Format::kPerUnit);
    for (int64_t block = 0; block < f.blocks_; ++block) {
      weigh(block, height);
      std::fill(d_weights.row(count), d_weights.row(height), 0.0f);  // of no key: may be infinite
      transpose_scores(height);
      for (int64_t row = 0; row < height; ++row) {
        compress(weights.row(row));
        compress(d_weights.row(row));
      }
      multiply_to<Format>(d_values, weights, rows_of(grads, block), height, f.width_, depth, block > 0);
      multiply_to<Format>(d_keys, d_weights, rows_of(queries, block), height, f.width_, depth, block > 0);
      const Matrix to{d_queries.row(block * f.queries_), d_queries.stride};
      add_to_queries(to, packed_keys, Format::units(height));
    }
    const Tokens<Format> dk(f.a_, f.a_.d_keys, head), dv(f.a_, f.a_.d_values, head);
    for (int64_t row = 0; row < count; ++row) {
      dk.write(first + row, d_keys.row(row), f.a_.scale);
      dv.write(first + row, d_values.row(row), 1.0f);
    }
  }

  // weights = P^T, d_weights = dS^T.
  void weigh(int64_t block, int64_t height) {
    const float *shifts = lse + block * f.queries_, *means = along + block * f.queries_;
    const Vector scale(f.a_.scale * kLog2E);
    const auto zero = [](int64_t, int64_t) { return Vector(0.0f); };
    multiply<Format>(keys, across_of(queries_across, block), height, f.queries_, f.units_, zero,
                     [&]<int C>(int64_t row, int64_t column, const Vector (&sums)[C]) {
#pragma GCC unroll 4
                       for (int c = 0; c < C; ++c) {
                         const Vector shift = Vector::loadu(shifts + column + c * kLanes);
                         const Vector weight = power_of_two(at::vec::fmsub(sums[c], scale, shift));
                         weight.store(weights.row(row) + column + c * kLanes);
                       }
                     });
    multiply<Format>(values, across_of(grads_across, block), height, f.queries_, f.units_, zero,
                     [&]<int C>(int64_t row, int64_t column, const Vector (&sums)[C]) {
#pragma GCC unroll 4
                       for (int c = 0; c < C; ++c) {
                         const Vector mean = Vector::loadu(means + column + c * kLanes);
                         const Vector weight = Vector::loadu(weights.row(row) + column + c * kLanes);
                         (weight * (sums[c] - mean)).store(d_weights.row(row) + column + c * kLanes);
                       }
                     });
    // Of no query: an infinite key or value makes them NaN.
    const int64_t count = std::min(f.queries_, f.a_.queries_count - block * f.queries_);
    for (int64_t row = 0; row < height; ++row) {
      for (const Matrix* matrix : {&weights, &d_weights}) {
        std::fill(matrix->row(row) + count, matrix->row(row) + f.queries_, 0.0f);
      }
    }
  }

  // d_scores (queries, keys in units) from d_weights (keys, queries).
  void transpose_scores(int64_t height) {
    for (int64_t row = 0; row < height; row += Format::kPerUnit) {
      Format::pair(d_weights.row(row), d_weights.stride, f.queries_, paired.row(row / Format::kPerUnit));
    }
    for (int64_t row = 0; row < f.queries_; row += kLanes) {
      const int64_t units = Format::units(height);
      for (int64_t u = 0; u < units; u += kLanes) {
        at::vec::transpose_mxn<float>(paired.row(u) + row, paired.stride, d_scores.row(row) + u, d_scores.stride,
                                      static_cast<int>(std::min(kLanes, units - u)), static_cast<int>(kLanes));
      }
    }
  }

  // d_queries of a block += d_scores keys; a tile's last rows may be the next block's, which get nothing.
  void add_to_queries(const Matrix& to, const Matrix& by, int64_t depth) {
    const int64_t height = round_up(f.queries_, kRows);
    for (int64_t row = f.queries_; row < height; ++row) std::fill(d_scores.row(row), d_scores.row(row + 1), 0.0f);
    multiply_to<Format>(to, d_scores, by, height, f.width_, depth, true);
  }

  // A row of numbers in `Format`, in place.
  void compress(float* line) {
    if constexpr (Format::kPerUnit == 2) {
      for (int64_t c = 0; c < f.queries_; c += 2 * kLanes) {
        Format::store_all({Vector::loadu(line + c), Vector::loadu(line + c + kLanes)}, line + c / 2);
      }
    }
  }

  // What this part of the keys gives to the gradients of the queries.
  void finish(int64_t part) {
    const Tokens<Format> out(f.a_, f.a_.d_queries, head);
    for (int64_t query = 0; query < f.a_.queries_count; ++query) {
      const float* sums = d_queries.row(query);
      if (f.a_.parts == 1) {
        out.write(query, sums, f.a_.scale);
      } else {
        const int64_t heads = f.a_.images * f.a_.heads;
        float* to = f.a_.partial + ((part * heads + head) * f.a_.queries_count + query) * f.a_.channels;
        for (int64_t c = 0; c < f.a_.channels; ++c) to[c] = f.a_.scale * sums[c];
      }
    }
  }

  const Backward& f;
  Scratch scratch;
  Matrix queries, grads, queries_across, grads_across, d_queries, keys, values, packed_keys, weights, d_weights, paired,
      d_scores, d_keys, d_values;
  float *lse, *along;
  int64_t head = -1;
};

}  // namespace
}  // namespace t2t
