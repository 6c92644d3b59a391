// Attention forward: see kernels.h. For a block of queries, scores of a block of keys, their softmax, and the weighted
// sum of the values, before the next block of keys; where there are several, earlier sums are scaled down (arXiv
// 2205.14135).
#pragma once

#include "../cpu/blocks.h"
#include "tokens.h"

namespace t2t {
namespace {

constexpr int64_t kQueries = 8 * kRows;  // of a block
constexpr int64_t kKeys = 384;           // of a block, at most

template <class Format>
class Forward {
 public:
  explicit Forward(const Attend& arguments)
      : a_(arguments),
        units_(Format::units(a_.channels)),
        width_(round_up(a_.channels, kLanes)),
        blocks_((a_.keys_count + kKeys - 1) / kKeys),
        keys_(round_up((a_.keys_count + blocks_ - 1) / blocks_, kLanes * Format::kPerUnit)) {}

  void run() const {
    const int64_t heads = a_.images * a_.heads, blocks = (a_.queries_count + kQueries - 1) / kQueries;
    const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
    const int64_t parts = threads == 1 ? 1 : std::clamp<int64_t>(4 * threads / heads, 1, blocks);
    at::parallel_for(0, heads * parts, 1, [&](int64_t begin, int64_t end) {
      Work work(*this);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t head = task / parts, part = task % parts;
        const int64_t first = blocks * part / parts, last = blocks * (part + 1) / parts;
        if (first == last) continue;
        work.pack(head);
        for (int64_t block = first; block < last; ++block) work.attend(block * kQueries);
      }
    });
  }

 private:
  struct Work;

  const Attend& a_;
  int64_t units_, width_;  // of a token's channels
  int64_t blocks_, keys_;  // blocks of keys, and keys in each
};

// What a thread holds: the packed keys and values of a head, and a block of queries with its results.
template <class Format>
struct Forward<Format>::Work {
  explicit Work(const Forward& forward) : f(forward) {
    scratch.lay_out([&] {
      keys = scratch.take(f.blocks_ * f.units_, row_stride(f.keys_));
      values = scratch.take(f.blocks_ * f.keys_ / Format::kPerUnit, row_stride(f.width_));
      rows = scratch.take(f.keys_, f.units_);
      queries = scratch.take(kQueries, f.units_);
      scores = scratch.take(kQueries, row_stride(f.keys_));
      output = scratch.take(kQueries, row_stride(f.width_));
      top = scratch.take(kQueries, kLanes);
      maximum = scratch.take(1, kQueries).data;
      total = scratch.take(1, kQueries).data;
      mask = scratch.take(1, f.keys_).data;
    });
  }

  // The keys of a block transposed, (units, keys), and its values, (keys in units, channels).
  Matrix keys_of(int64_t block) const { return {keys.row(block * f.units_), keys.stride}; }
  Matrix values_of(int64_t block) const { return {values.row(block * f.keys_ / Format::kPerUnit), values.stride}; }

  int64_t keys_in(int64_t block) const { return std::clamp<int64_t>(f.a_.keys_count - block * f.keys_, 0, f.keys_); }

  void pack(int64_t head_) {
    if (head == head_) return;
    head = head_;
    const Tokens<Format> k(f.a_, f.a_.keys, head), v(f.a_, f.a_.values, head);
    for (int64_t block = 0; block < f.blocks_; ++block) {
      k.transpose(block * f.keys_, keys_in(block), keys_of(block), rows);
      v.pack(block * f.keys_, keys_in(block), values_of(block), f.keys_ / Format::kPerUnit);
    }
  }

  // The outputs of up to kQueries queries from `first` on.
  void attend(int64_t first) {
    const int64_t count = std::min(kQueries, f.a_.queries_count - first);
    height = round_up(count, kRows);
    Tokens<Format>(f.a_, f.a_.queries, head).copy(first, count, queries, height);
    for (int64_t block = 0; block < f.blocks_; ++block) {
      score(block);
      for (int64_t row = 0; row < height; ++row) weigh(row, block == 0);
      multiply_to<Format>(output, scores, values_of(block), height, f.width_, f.keys_ / Format::kPerUnit, true);
    }
    const Tokens<Format> out(f.a_, f.a_.output, head);
    for (int64_t row = 0; row < count; ++row) {
      out.write(first + row, output.row(row), 1.0f / total[row]);
      if (f.a_.lse != nullptr) {
        f.a_.lse[head * f.a_.queries_count + first + row] = maximum[row] / kLog2E + std::log(total[row]);
      }
    }
  }

  // The block's scores, times log2(e), and the largest of each row, a vector of candidates.
  void score(int64_t block) {
    std::fill(mask, mask + keys_in(block), 0.0f);
    std::fill(mask + keys_in(block), mask + f.keys_, kNothing);
    for (int64_t row = 0; row < height; ++row) Vector(kNothing).store(top.row(row));
    const Vector scale(f.a_.scale * kLog2E);
    multiply<Format>(
        queries, keys_of(block), height, f.keys_, f.units_, [](int64_t, int64_t) { return Vector(0.0f); },
        [&]<int C>(int64_t row, int64_t column, const Vector (&sums)[C]) {
          Vector best = Vector::loadu(top.row(row));
#pragma GCC unroll 4
          for (int c = 0; c < C; ++c) {
            const Vector score = at::vec::fmadd(sums[c], scale, Vector::loadu(mask + column + c * kLanes));
            best = at::vec::clamp_min(score, best);
            score.store(scores.row(row) + column + c * kLanes);
          }
          best.store(top.row(row));
        });
  }

  // Scores become weights, in `Format` and in place; earlier sums are scaled to the new maximum.
  void weigh(int64_t row, bool is_first) {
    const float before = is_first ? kNothing : maximum[row];
    const float now = std::max(largest(Vector::loadu(top.row(row))), before);
    const Vector shift(now == kNothing ? 0.0f : now);  // no difference of infinities: later keys may have weights
    float* line = scores.row(row);
    Vector sums(0.0f);
    for (int64_t key = 0; key < f.keys_; key += kLanes * Format::kPerUnit) {
      Vector weights[Format::kPerUnit];
#pragma GCC unroll 2
      for (int i = 0; i < Format::kPerUnit; ++i) {
        weights[i] = power_of_two(Vector::loadu(line + key + i * kLanes) - shift);
        sums = sums + weights[i];
      }
      Format::store_all(weights, line + key / Format::kPerUnit);
    }
    maximum[row] = now;
    const float faded = is_first ? 0.0f : before == now ? 1.0f : std::exp2(before - now);
    total[row] = is_first ? sum(sums) : total[row] * faded + sum(sums);
    if (faded == 1.0f) return;
    float* out = output.row(row);
    for (int64_t c = 0; c < f.width_; c += kLanes) {
      (is_first ? Vector(0.0f) : Vector::loadu(out + c) * Vector(faded)).store(out + c);
    }
  }

  const Forward& f;
  Scratch scratch;
  Matrix keys, values, rows, queries, scores, output, top;
  float *maximum, *total, *mask;
  int64_t head = -1, height = 0;
};

}  // namespace
}  // namespace t2t
