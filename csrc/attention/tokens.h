// The tokens of one head, and the forms in which matmuls read them.
#pragma once

#include "../cpu/blocks.h"
#include "kernels.h"

namespace t2t {
namespace {

template <class Format>
class Tokens {
 public:
  using Element = typename Format::Element;

  Tokens(const Sizes& sizes, const HeadTokens& tokens, int64_t head)
      : data_(static_cast<Element*>(tokens.data) + head / sizes.heads * tokens.image_stride +
              head % sizes.heads * tokens.head_stride),
        stride_(tokens.token_stride),
        channels_(sizes.channels) {}

  Element* token(int64_t index) const { return data_ + index * stride_; }

  // Rows of `out`: `count` tokens from `first` on, and zeros up to `height` rows.
  void copy(int64_t first, int64_t count, const Matrix& out, int64_t height) const {
    for (int64_t row = 0; row < count; ++row) Format::copy(token(first + row), channels_, out.row(row));
    std::fill(out.row(count), out.row(height), 0.0f);
  }

  // Columns of `out` (units of channels, tokens), zero beyond them; `rows` is room for the tokens.
  void transpose(int64_t first, int64_t count, const Matrix& out, const Matrix& rows) const {
    const int64_t units = Format::units(channels_);
    if (channels_ % Format::kPerUnit == 0 && stride_ % Format::kPerUnit == 0) {
      const auto* from = reinterpret_cast<const float*>(token(first));
      return t2t::transpose(from, stride_ / Format::kPerUnit, count, units, out);
    }
    copy(first, count, rows, count);
    t2t::transpose(rows.data, rows.stride, count, units, out);
  }

  // Rows of `out` (units of tokens, channels), zero beyond them, `depth` rows in all.
  void pack(int64_t first, int64_t count, const Matrix& out, int64_t depth) const {
    for (int64_t row = 0; row < depth; ++row) {
      const int64_t at = row * Format::kPerUnit, valid = std::clamp<int64_t>(count - at, 0, Format::kPerUnit);
      if (valid > 0) Format::pack(token(first + at), stride_, valid, channels_, out.row(row));
      std::fill(out.row(row) + (valid > 0 ? channels_ : 0), out.row(row + 1), 0.0f);
    }
  }

  void write(int64_t index, const float* values, float factor) const {
    Format::write(values, factor, channels_, token(index));
  }

 private:
  Element* data_;
  int64_t stride_, channels_;
};

}  // namespace
}  // namespace t2t
