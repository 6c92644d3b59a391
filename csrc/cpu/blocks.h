// Matmuls of blocks that stay in the cache, for what runs between them: no result goes through memory.
//
// Everything is in an anonymous namespace, because two files may compile it for different instructions.
// A matmul's depth is counted in units of 32 bits: one float32, or two neighbours in bfloat16. `Format` says which.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

namespace t2t {
namespace {

using Vector = at::vec::Vectorized<float>;

constexpr int64_t kLanes = Vector::size();
constexpr int kRows = 6;                         // of a tile; with its vectors, what the registers hold
constexpr int kVectors = kLanes >= 16 ? 4 : 2;
constexpr float kLog2E = 1.44269504f;
constexpr float kNothing = -std::numeric_limits<float>::infinity();

int64_t round_up(int64_t count, int64_t multiple) { return (count + multiple - 1) / multiple * multiple; }

// The distance of two rows: an odd number of vectors, so that a column's rows do not share a few sets of the cache.
int64_t row_stride(int64_t floats) { return (round_up(floats, kLanes) / kLanes | 1) * kLanes; }

struct Matrix {
  float* data;
  int64_t stride;  // of a row

  float* row(int64_t index) const { return data + index * stride; }
};

// run(first vector, integral constant of their number) for tiles of about equal width.
template <class F>
inline __attribute__((always_inline)) void for_tiles(int64_t vectors, F&& run) {
  const int64_t tiles = (vectors + kVectors - 1) / kVectors;
  for (int64_t tile = 0, first = 0; tile < tiles; ++tile) {
    const int64_t width = vectors / tiles + (tile < vectors % tiles);
    if constexpr (kVectors >= 4) {
      if (width == 4) run(first, std::integral_constant<int, 4>());
      if (width == 3) run(first, std::integral_constant<int, 3>());
    }
    if (width == 2) run(first, std::integral_constant<int, 2>());
    if (width == 1) run(first, std::integral_constant<int, 1>());
    first += width;
  }
}

// Where a matmul finds the rows of its left side: rows of a matrix, or of windows.
struct MatrixRows {
  const Matrix& matrix;
  int64_t depth;

  static constexpr int64_t segments() { return 1; }
  int64_t units() const { return depth; }
  const float* at(int64_t row, int64_t) const { return matrix.row(row); }
};

// sums (kRows, C vectors) = start(row, column) + a b, then finish(row, column of the first vector, its C vectors), for
// all tiles: rows are a multiple of kRows, columns of kLanes, and both must lie in memory. A row of `a` is `segments()`
// times `units()` units, one behind the other in the rows of `b`.
template <class Format, class Rows, class Start, class Finish>
inline __attribute__((always_inline)) void multiply_rows(const Rows& a, const Matrix& b, int64_t rows, int64_t columns,
                                                         Start&& start, Finish&& finish) {
  for_tiles(columns / kLanes, [&]<int C>(int64_t first, std::integral_constant<int, C>) {
    const int64_t column = first * kLanes;
    for (int64_t row = 0; row < rows; row += kRows) {
      Vector sums[kRows][C];
#pragma GCC unroll 6
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) sums[r][c] = start(row + r, column + c * kLanes);
      }
      const float* right = b.data + column;
      for (int64_t segment = 0; segment < a.segments(); ++segment) {
        const float* left[kRows];
#pragma GCC unroll 6
        for (int r = 0; r < kRows; ++r) left[r] = a.at(row + r, segment);
        for (int64_t k = 0; k < a.units(); ++k, right += b.stride) {
          Vector values[C];
#pragma GCC unroll 4
          for (int c = 0; c < C; ++c) values[c] = Vector::loadu(right + c * kLanes);
#pragma GCC unroll 6
          for (int r = 0; r < kRows; ++r) {
            const Vector factor(left[r][k]);
#pragma GCC unroll 4
            for (int c = 0; c < C; ++c) sums[r][c] = Format::add_product(factor, values[c], sums[r][c]);
          }
        }
      }
#pragma GCC unroll 6
      for (int r = 0; r < kRows; ++r) finish(row + r, column, sums[r]);
    }
  });
}

template <class Format, class Start, class Finish>
inline __attribute__((always_inline)) void multiply(const Matrix& a, const Matrix& b, int64_t rows, int64_t columns,
                                                    int64_t depth, Start&& start, Finish&& finish) {
  multiply_rows<Format>(MatrixRows{a, depth}, b, rows, columns, start, finish);
}

// out += a b, or out = a b.
template <class Format>
inline void multiply_to(const Matrix& out, const Matrix& a, const Matrix& b, int64_t rows, int64_t columns,
                        int64_t depth, bool add) {
  multiply<Format>(
      a, b, rows, columns, depth,
      [&](int64_t row, int64_t column) { return add ? Vector::loadu(out.row(row) + column) : Vector(0.0f); },
      [&]<int C>(int64_t row, int64_t column, const Vector (&sums)[C]) {
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) sums[c].store(out.row(row) + column + c * kLanes);
      });
}

// 2^x to 3e-7 of itself with AVX512, to 20 units in the last place elsewhere; 0 for -infinity, and NaN for NaN.
inline Vector power_of_two(const Vector& x) {
#if defined(CPU_CAPABILITY_AVX512)
  const Vector bounded = at::vec::clamp_min(x, Vector(-160.0f));
  const Vector whole = bounded.round(), rest = bounded - whole;
  Vector power(0.00132764725f);
  for (const float c : {0.00967554189f, 0.0555071309f, 0.240221202f, 0.693146944f, 1.00000012f}) {
    power = at::vec::fmadd(power, rest, Vector(c));
  }
  return _mm512_scalef_ps(power, whole);
#else
  const Vector power = (x * Vector(0.693147181f)).exp_u20();
  return Vector::blendv(power, x, x.isnan());  // exp_u20 makes a number of NaN
#endif
}

inline float largest(const Vector& vector) {
  const auto larger = [](const Vector& a, const Vector& b) { return at::vec::clamp_min(a, b); };
  return at::vec::vec_reduce_all<float>(larger, vector);
}

inline float sum(const Vector& vector) {
  return at::vec::vec_reduce_all<float>([](const Vector& a, const Vector& b) { return a + b; }, vector);
}

// Matrices of one thread, aligned to cache lines.
class Scratch {
 public:
  // Allocates what `take_all()` takes: the first round, without memory, counts it.
  template <class F>
  void lay_out(F&& take_all) {
    take_all();
    memory_ = c10::GetCPUAllocator()->allocate(used_ * sizeof(float));
    used_ = 0;
    take_all();
  }

  Matrix take(int64_t rows, int64_t stride) {
    float* taken = static_cast<float*>(memory_.get());
    if (taken != nullptr) taken += used_;
    used_ += round_up(rows * stride, 16);
    return {taken, stride};
  }

 private:
  c10::DataPtr memory_;
  int64_t used_ = 0;
};

// out (units, stride) = the transpose of `rows` rows of `units` units; columns up to `stride` are zero.
inline void transpose(const float* in, int64_t in_stride, int64_t rows, int64_t units, const Matrix& out_) {
  float* out = out_.data;
  const int64_t stride = out_.stride;
  for (int64_t r = 0; r < stride; r += kLanes) {
    const int64_t height = std::clamp<int64_t>(rows - r, 0, kLanes);
    for (int64_t u = 0; u < units; u += kLanes) {
      const int64_t width = std::min(kLanes, units - u);
      if (height < kLanes) {
        for (int64_t i = 0; i < width; ++i) std::memset(out + (u + i) * stride + r, 0, kLanes * sizeof(float));
      }
      if (height > 0) {
        at::vec::transpose_mxn<float>(in + r * in_stride + u, in_stride, out + u * stride + r, stride,
                                      static_cast<int>(height), static_cast<int>(width));
      }
    }
  }
}

struct Float32 {
  using Element = float;
  static constexpr int kPerUnit = 1;
  static int64_t units(int64_t count) { return count; }

  static Vector add_product(const Vector& a, const Vector& b, const Vector& sum) { return at::vec::fmadd(a, b, sum); }

  static void store_all(const Vector (&values)[1], float* to) { values[0].store(to); }

  static void copy(const float* from, int64_t channels, float* to) { std::copy(from, from + channels, to); }

  static void pack(const float* from, int64_t, int64_t, int64_t channels, float* to) {
    std::copy(from, from + channels, to);
  }

  static void pair(const float* first, int64_t, int64_t count, float* to) { std::copy(first, first + count, to); }

  static void write(const float* from, float factor, int64_t channels, float* to) {
    for (int64_t c = 0; c < channels; ++c) to[c] = factor * from[c];
  }

  // Up to kLanes numbers, zeros beyond them.
  static Vector load(const float* from, int64_t count) {
    return count < kLanes ? Vector::loadu(from, count) : Vector::loadu(from);
  }
  static void store(const Vector& values, float* to, int64_t count) { values.store(to, static_cast<int>(count)); }

  static float value(float element) { return element; }
  static float rounded(float number) { return number; }
};

}  // namespace
}  // namespace t2t
