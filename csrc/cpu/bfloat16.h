// AVX512's bfloat16 matmuls: for files that are compiled for them, behind bfloat16_target.h.
#pragma once

#include "blocks.h"

namespace t2t {
namespace {

struct BFloat16 {
  using Element = c10::BFloat16;
  static constexpr int kPerUnit = 2;
  static int64_t units(int64_t count) { return (count + 1) / 2; }

  static Vector add_product(const Vector& a, const Vector& b, const Vector& sum) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(static_cast<__m512>(a)),
                            reinterpret_cast<__m512bh>(static_cast<__m512>(b)));
  }

  // 32 numbers in their order.
  static void store_all(const Vector (&values)[2], void* to) {
    _mm512_storeu_si512(to, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(values[1], values[0])));
  }

  static void copy(const Element* from, int64_t channels, float* to) {
    std::memcpy(to, from, channels * sizeof(Element));
    if (channels % 2) reinterpret_cast<uint16_t*>(to)[channels] = 0;
  }

  // Two tokens, `stride` apart, or one and zeros, channel by channel.
  static void pack(const Element* from, int64_t stride, int64_t tokens, int64_t channels, float* to) {
    auto* line = reinterpret_cast<uint32_t*>(to);
    const Element* next = from + stride;
    if (tokens == 2) {
      for (int64_t c = 0; c < channels; ++c) line[c] = from[c].x | static_cast<uint32_t>(next[c].x) << 16;
    } else {
      for (int64_t c = 0; c < channels; ++c) line[c] = from[c].x;
    }
  }

  // The same for two rows of float32 numbers, a multiple of kLanes.
  static void pair(const float* first, int64_t stride, int64_t count, float* to) {
    const auto bits = [](const float* from) {
      return _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_loadu_ps(from))));
    };
    for (int64_t c = 0; c < count; c += kLanes) {
      const __m512i both = _mm512_or_si512(bits(first + c), _mm512_slli_epi32(bits(first + stride + c), 16));
      _mm512_storeu_si512(to + c, both);
    }
  }

  static void write(const float* from, float factor, int64_t channels, Element* to) {
    int64_t c = 0;
    for (const Vector times(factor); c + 2 * kLanes <= channels; c += 2 * kLanes) {
      store_all({Vector::loadu(from + c) * times, Vector::loadu(from + c + kLanes) * times}, to + c);
    }
    for (; c < channels; ++c) to[c] = factor * from[c];
  }

  // Up to kLanes numbers, zeros beyond them.
  static Vector load(const Element* from, int64_t count) {
    const __m256i bits = _mm256_maskz_loadu_epi16(mask(count), from);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  static void store(const Vector& values, Element* to, int64_t count) {
    _mm256_mask_storeu_epi16(to, mask(count), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(values)));
  }
  static __mmask16 mask(int64_t count) { return count < kLanes ? (1u << count) - 1 : 0xffff; }

  static float value(Element element) { return element; }
  static float rounded(float number) { return Element(number); }
};

}  // namespace
}  // namespace t2t
