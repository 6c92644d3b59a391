// See kernels.h. A band of the image is laid out with the channels of a pixel side by side, and zeros around it: then a
// row of a window is one piece of memory, and windows are rows of a matmul without being written anywhere.
//
// With W_c the weight, whose rows have the mean 0, Linear(LayerNorm(u)) = rstd(u) (W_c u) + offset for a window u.
#pragma once

#include "../cpu/blocks.h"
#include "kernels.h"

namespace t2t {
namespace {

template <class Format>
class Windows {
 public:
  using Element = typename Format::Element;

  explicit Windows(const WindowsLinear& arguments)
      : a_(arguments),
        channels_(round_up(a_.channels, Format::kPerUnit)),
        pitch_((a_.width + 2 * a_.padding[1]) * channels_),
        outputs_(round_up(a_.outputs, kLanes)),
        units_(a_.kernel[1] * channels_ / Format::kPerUnit) {
    scratch_.lay_out([&] {
      weight_ = scratch_.take(a_.kernel[0] * units_, row_stride(outputs_));
      offset_ = scratch_.take(1, outputs_).data;
      residue_ = scratch_.take(1, outputs_).data;
    });
    pack();
  }

  void run() const {
    constexpr int64_t kWindows = 96;  // of a band, at least
    const int64_t bands = std::clamp<int64_t>(a_.grid[0] * a_.grid[1] / kWindows, 1, std::min<int64_t>(8, a_.grid[0]));
    at::parallel_for(0, a_.images * bands, 1, [&](int64_t begin, int64_t end) {
      Band band(*this, (a_.grid[0] + bands - 1) / bands);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t part = task % bands;
        band.run(task / bands, a_.grid[0] * part / bands, a_.grid[0] * (part + 1) / bands);
      }
    });
  }

 private:
  struct Band;

  // Weights as (vertical offset, horizontal offset and channel in units, outputs), and each output's sum of them.
  void pack() {
    std::fill(offset_, offset_ + outputs_, 0.0f);
    if (a_.offset != nullptr) std::copy(a_.offset, a_.offset + a_.outputs, offset_);
    std::fill(residue_, residue_ + outputs_, 0.0f);
    const int64_t area = a_.kernel[0] * a_.kernel[1], depth = area * a_.channels;
    Scratch scratch;
    Matrix across{}, pair{};
    scratch.lay_out([&] {
      across = scratch.take(depth, row_stride(outputs_));
      pair = scratch.take(2, row_stride(outputs_));
    });
    transpose(a_.weight, depth, a_.outputs, depth, across);
    for (int64_t place = 0; place < area; ++place) {
      for (int64_t channel = 0; channel < channels_; channel += Format::kPerUnit) {
        for (int64_t i = 0; i < Format::kPerUnit; ++i) {
          const bool exists = channel + i < a_.channels;
          const float* row = across.row(exists ? (channel + i) * area + place : 0);
          for (int64_t o = 0; o < pair.stride; ++o) pair.row(i)[o] = exists ? Format::rounded(row[o]) : 0.0f;
          for (int64_t o = 0; o < outputs_; ++o) residue_[o] += pair.row(i)[o];
        }
        Format::pair(pair.data, pair.stride, pair.stride, weight_.row((place * channels_ + channel) / Format::kPerUnit));
      }
    }
  }

  const WindowsLinear& a_;
  int64_t channels_, pitch_, outputs_, units_;  // pitch: elements between two rows of a band
  Scratch scratch_;
  Matrix weight_;
  float *offset_, *residue_;
};

// The windows of some rows of the grid, as rows of a matmul.
template <class Format>
struct Windows<Format>::Band {
  Band(const Windows& windows, int64_t grid_rows) : w(windows), a(windows.a_) {
    const int64_t rows = (grid_rows - 1) * a.step[0] + a.kernel[0], width = a.width + 2 * a.padding[1];
    const int64_t count = round_up(grid_rows * a.grid[1], kRows);
    scratch.lay_out([&] {
      pixels = scratch.take(rows, (w.pitch_ + Format::kPerUnit - 1) / Format::kPerUnit);
      planes = scratch.take(std::min(a.channels, kLanes), width + kLanes);
      for (float** line : {&pixel.mean, &pixel.variance, &united.mean, &united.variance}) {
        *line = scratch.take(1, width + a.kernel[1] + 2 * kLanes).data;  // vectors reach beyond the last pixel
      }
      for (Matrix* map : {&row_mean, &row_variance}) *map = scratch.take(rows, round_up(a.grid[1], kLanes));
      mean = scratch.take(1, count).data;
      rstd = scratch.take(1, count).data;
    });
    places.resize(count);
  }

  void run(int64_t image, int64_t first, int64_t last) {
    const int64_t count = (last - first) * a.grid[1];
    lay_out(image, first * a.step[0] - a.padding[0], (last - first - 1) * a.step[0] + a.kernel[0]);
    if (a.normed) find_statistics(last - first);
    for (int64_t window = 0; window < round_up(count, kRows); ++window) {
      const int64_t at = std::min(window, count - 1);  // the last one again, for whole tiles
      places[window] = element(at / a.grid[1] * a.step[0], at % a.grid[1] * a.step[1]);
    }
    auto* to = static_cast<Element*>(a.output) + (image * a.grid[0] + first) * a.grid[1] * a.outputs;
    multiply_rows<Format>(
        *this, w.weight_, round_up(count, kRows), w.outputs_, [](int64_t, int64_t) { return Vector(0.0f); },
        [&]<int C>(int64_t row, int64_t column, const Vector (&sums)[C]) {
#pragma GCC unroll 4
          for (int c = 0; c < C && row < count; ++c) {
            const int64_t at = column + c * kLanes;
            Format::store(finish(row, at, sums[c]), to + row * a.outputs + at, std::min(kLanes, a.outputs - at));
          }
        });
  }

  // The rows of the matmul's left side.
  int64_t segments() const { return a.kernel[0]; }
  int64_t units() const { return w.units_; }
  const float* at(int64_t row, int64_t segment) const {
    return reinterpret_cast<const float*>(places[row] + segment * w.pitch_);
  }

 private:
  Element* element(int64_t row, int64_t column) const {
    return reinterpret_cast<Element*>(pixels.data) + row * w.pitch_ + column * w.channels_;
  }

  // `rows` rows of the image from `first` on, which may lie outside of it.
  void lay_out(int64_t image, int64_t first, int64_t rows) {
    const auto* from = static_cast<const Element*>(a.image) + image * a.image_stride;
    for (int64_t row = 0; row < rows; ++row) {
      Element *line = element(row, 0), *inside = element(row, a.padding[1]);
      const int64_t source = first + row;
      if (source < 0 || source >= a.height) {
        std::fill(line, line + w.pitch_, Element(0));
        continue;
      }
      std::fill(line, inside, Element(0));
      std::fill(inside + a.width * w.channels_, line + w.pitch_, Element(0));
      const Element* values = from + source * a.row_stride;
      if (a.channels == w.channels_ && a.channel_stride == 1 && a.column_stride == a.channels) {
        std::copy(values, values + a.width * w.channels_, inside);
        continue;
      }
      for (int64_t c = 0; c < w.channels_; ++c) {
        for (int64_t x = 0; x < a.width; ++x) {
          inside[x * w.channels_ + c] =
              c < a.channels ? values[c * a.channel_stride + x * a.column_stride] : Element(0);
        }
      }
    }
  }

  // Mean and 1/sqrt(variance + eps) of each window, 0 for a constant one: over channels, then columns, then rows, by
  // the law of total variance. No difference of large squares occurs.
  void find_statistics(int64_t grid_rows) {
    const int64_t rows = (grid_rows - 1) * a.step[0] + a.kernel[0], width = a.width + 2 * a.padding[1];
    for (int64_t row = 0; row < rows; ++row) {
      a.channels < kLanes ? describe_row(row, width) : describe_pixels(row, width);
      for (int64_t x = 0; x + a.kernel[1] <= width; x += kLanes) {
        const auto [means, variances] = unite(a.kernel[1], [&](int64_t i) {
          return Moments{Vector::loadu(pixel.mean + x + i), Vector::loadu(pixel.variance + x + i)};
        });
        means.store(united.mean + x);
        variances.store(united.variance + x);
      }
      for (int64_t x = 0; x < a.grid[1]; ++x) {
        row_mean.row(row)[x] = united.mean[x * a.step[1]];
        row_variance.row(row)[x] = united.variance[x * a.step[1]];
      }
    }
    for (int64_t y = 0; y < grid_rows; ++y) {
      for (int64_t x = 0; x < a.grid[1]; x += kLanes) {
        const auto [means, variances] = unite(a.kernel[0], [&](int64_t i) {
          return Moments{Vector::loadu(row_mean.row(y * a.step[0] + i) + x),
                         Vector::loadu(row_variance.row(y * a.step[0] + i) + x)};
        });
        const int64_t count = std::min(kLanes, a.grid[1] - x);
        means.store(mean + y * a.grid[1] + x, static_cast<int>(count));
        const Vector rounding = means * Vector(4 * std::numeric_limits<float>::epsilon());
        const Vector constant = variances <= rounding * rounding;
        Vector::blendv((variances + Vector(a.eps)).rsqrt(), Vector(0.0f), constant)
            .store(rstd + y * a.grid[1] + x, static_cast<int>(count));
      }
    }
  }

  struct Moments {
    Vector mean, variance;
  };

  // Mean and variance of `count` equal groups together, group(i) each. The variance is taken around the mean as it was
  // rounded, and the mean is corrected: equal values have a variance of 0.
  template <class F>
  static Moments unite(int64_t count, F&& group) {
    Vector sums(0.0f), within(0.0f), rests(0.0f), between(0.0f);
    for (int64_t i = 0; i < count; ++i) {
      const Moments moments = group(i);
      sums = sums + moments.mean;
      within = within + moments.variance;
    }
    const Vector share(1.0f / count), middle = sums * share;
    for (int64_t i = 0; i < count; ++i) {
      const Vector deviation = group(i).mean - middle;
      rests = rests + deviation;
      between = at::vec::fmadd(deviation, deviation, between);
    }
    const Vector spread = at::vec::clamp_min(between - rests * rests * share, Vector(0.0f));
    return {middle + rests * share, (within + spread) * share};
  }

  // Mean and variance of the channels of each pixel of a row, a vector of pixels at a time.
  void describe_row(int64_t row, int64_t width) {
    for (int64_t c = 0; c < a.channels; ++c) {
      const Element* values = element(row, 0) + c;
      for (int64_t x = 0; x < width; ++x) planes.row(c)[x] = Format::value(values[x * w.channels_]);
    }
    for (int64_t x = 0; x < width; x += kLanes) {
      const auto [means, variances] = unite(a.channels, [&](int64_t c) {
        return Moments{Vector::loadu(planes.row(c) + x), Vector(0.0f)};
      });
      means.store(pixel.mean + x);
      variances.store(pixel.variance + x);
    }
  }

  // The same a vector of channels at a time.
  void describe_pixels(int64_t row, int64_t width) {
    const float share = 1.0f / a.channels;
    for (int64_t x = 0; x < width; ++x) {
      const Element* values = element(row, x);
      Vector sums(0.0f), rests(0.0f), squares(0.0f);
      for (int64_t c = 0; c < a.channels; c += kLanes) sums = sums + Format::load(values + c, a.channels - c);
      const float middle = sum(sums) * share;
      for (int64_t c = 0; c < a.channels; c += kLanes) {
        Vector deviation = Format::load(values + c, a.channels - c) - Vector(middle);
        if (a.channels - c < kLanes) deviation = Vector::set(Vector(0.0f), deviation, a.channels - c);
        rests = rests + deviation;
        squares = at::vec::fmadd(deviation, deviation, squares);
      }
      const float rest = sum(rests);
      pixel.mean[x] = middle + rest * share;
      pixel.variance[x] = std::max(0.0f, (sum(squares) - rest * rest * share) * share);
    }
  }

  Vector finish(int64_t row, int64_t column, Vector sums) const {
    if (a.normed) {
      // Rounded rows of W_c no longer sum to 0: what a window's mean leaves behind goes.
      sums = (sums - Vector(mean[row]) * Vector::loadu(w.residue_ + column)) * Vector(rstd[row]);
    }
    return sums + Vector::loadu(w.offset_ + column);
  }

  const Windows& w;
  const WindowsLinear& a;
  Scratch scratch;
  Matrix pixels, planes, row_mean, row_variance;
  struct { float *mean, *variance; } pixel, united;
  float *mean, *rstd;
  std::vector<const Element*> places;
};

}  // namespace
}  // namespace t2t
