// Products of 8-bit integers: rows of x as codes with a scale for every 64, and sums of products in lanes of 32 bits.

#pragma once

#include "handler.h"

namespace qlora {

constexpr int64_t kGroup = 64;           // codes that share a scale
constexpr int64_t kCodes = 4 * kLanes;   // codes per vector
typedef int8_t Codes __attribute__((vector_size(kCodes)));
typedef uint8_t PackedCodes __attribute__((vector_size(kCodes)));
typedef int8_t Narrow __attribute__((vector_size(kLanes)));

#if defined(__AVX512VNNI__)
constexpr int kZero = 128;  // what stands for 0 in weights: the instruction takes them without a sign
#else
constexpr int kZero = 0;
#endif

// Adds products to lane i: w[j] x[j] for 4 i <= j < 4 i + 4. All codes are above -128.
inline Integers add_products(Codes w, Codes x, Integers sums) {
#if defined(__AVX512VNNI__)
  return (Integers)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)w, (__m512i)x);
#elif defined(__AVX512F__)
  const __mmask64 negative = _mm512_movepi8_mask((__m512i)w);
  const __m512i x_signed = _mm512_mask_sub_epi8((__m512i)x, negative, _mm512_setzero_si512(), (__m512i)x);
  const __m512i two = _mm512_maddubs_epi16(_mm512_abs_epi8((__m512i)w), x_signed);
  return sums + (Integers)_mm512_madd_epi16(two, _mm512_set1_epi16(1));
#elif defined(__AVX2__)
  const __m256i x_signed = _mm256_sign_epi8((__m256i)x, (__m256i)w);
  const __m256i two = _mm256_maddubs_epi16(_mm256_abs_epi8((__m256i)w), x_signed);
  return sums + (Integers)_mm256_madd_epi16(two, _mm256_set1_epi16(1));
#elif defined(__ARM_FEATURE_DOTPROD)
  return (Integers)vdotq_s32((int32x4_t)sums, (int8x16_t)w, (int8x16_t)x);
#else
  const int16x8_t low = vmull_s8(vget_low_s8((int8x16_t)w), vget_low_s8((int8x16_t)x));
  const int16x8_t high = vmull_high_s8((int8x16_t)w, (int8x16_t)x);
  return sums + (Integers)vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high));
#endif
}

// 16 bytes, looked up by codes below 16.
struct ByteTable {
  Codes bytes;  // repeated

  explicit ByteTable(const int8_t* at) {
    for (int64_t i = 0; i < kCodes; i += 16) std::memcpy(reinterpret_cast<int8_t*>(&bytes) + i, at, 16);
  }
  Codes operator[](PackedCodes codes) const {
#if defined(__AVX512F__)
    return (Codes)_mm512_shuffle_epi8((__m512i)bytes, (__m512i)codes);
#elif defined(__AVX2__)
    return (Codes)_mm256_shuffle_epi8((__m256i)bytes, (__m256i)codes);
#else
    return (Codes)vqtbl1q_s8((int8x16_t)bytes, (uint8x16_t)codes);
#endif
  }
};

// Rows of x as integers from -127 to 127, times a scale per group.
struct CodedRows {
  Buffer<int8_t> codes;    // [M, K]
  Buffer<float> scales;    // [M, K / 64]
  Buffer<int32_t> starts;  // [M, K / 64, kLanes]: sums with which the products of a group with weights begin

  CodedRows(const float* x, int64_t m, int64_t k)
      : codes(m * k), scales(m * k / kGroup), starts(m * k / kGroup * kLanes) {
    for (int64_t group = 0; group < m * k / kGroup; ++group) code(x + group * kGroup, group);
  }

 private:
  // If a number is not finite, its group's scale is NaN, and so are the row's results.
  void code(const float* x, int64_t group) {
    Floats sizes{}, zeros{};
    for (int64_t i = 0; i < kGroup; i += kLanes) {
      const Floats at = load(x + i);
      sizes = max(sizes, at < 0.0f ? -at : at);
      zeros += at * 0.0f;
    }
    const float size = greatest(sizes), zero = sum(zeros), up = size > 0 && zero == 0 ? 127.0f / size : 0.0f;
    int8_t* to = codes.get() + group * kGroup;
    for (int64_t i = 0; i < kGroup; i += kLanes) {
      const Floats rounded = load(x + i) * up + 12582912.0f;  // 1.5 * 2^23: the lowest bits are the integer
      const auto bytes = __builtin_convertvector(bits_of(rounded), Narrow);
      std::memcpy(to + i, &bytes, sizeof bytes);
    }
    Integers start{};
    for (int64_t i = 0; i < kGroup; i += kCodes)
      start -= add_products(Codes{} + static_cast<int8_t>(kZero), load<Codes>(to + i), Integers{});
    std::memcpy(starts.get() + group * kLanes, &start, sizeof start);
    scales.get()[group] = size / 127.0f + zero;
  }
};

}  // namespace qlora
