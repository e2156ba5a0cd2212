// What one step of a product contracts: an f32 number, or a pair of bf16 numbers where the processor multiplies pairs.

#pragma once

#include <type_traits>

#include "lanes.h"

namespace qlora {

// Of f32 numbers, and of bf16 numbers that are converted to f32.
template <typename Element>
struct Singles {
  using Word = float;    // a term
  using Words = Floats;  // terms of neighbouring columns
  using Number = float;  // a number in scratch memory
  static constexpr int64_t kNumbers = 1;
  static constexpr bool kInPlace = std::is_same_v<Element, float>;  // arrays of elements are arrays of words
  static constexpr Word kOne = 1.0f;

  static Words broadcast(Word x) { return all(x); }
  static Floats add_product(Words a, Words b, Floats sum) { return multiply_add(a, b, sum); }
  static Floats rounded(Floats x) {
    if constexpr (kInPlace) return x;
    return floats_of(qlora::rounded(x) << 16);
  }
  static void store(Floats x, Number* to) { qlora::store(rounded(x), to); }
  static Word word(const Element* at) { return number(*at); }
};

#if defined(__AVX512BF16__) || defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
// Of pairs of bf16 numbers.
struct Pairs {
  using Word = uint32_t;
  using Words = Integers;
  using Number = uint16_t;
  static constexpr int64_t kNumbers = 2;
  static constexpr bool kInPlace = true;
  static constexpr Word kOne = 0x3f803f80;

  static Words broadcast(Word x) { return all(static_cast<int32_t>(x)); }
#if defined(__AVX512BF16__)
  static Floats add_product(Words a, Words b, Floats sum) {
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
  static Floats rounded(Floats x) {
    return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)x)), 16);
  }
  static void store(Floats x, Number* to) {
    const __m256bh numbers = _mm512_cvtneps_pbh((__m512)x);
    std::memcpy(to, &numbers, sizeof numbers);
  }
#else
  static Floats add_product(Words a, Words b, Floats sum) {
    return (Floats)vbfdotq_f32((float32x4_t)sum, (bfloat16x8_t)a, (bfloat16x8_t)b);
  }
  static Floats rounded(Floats x) { return floats_of(qlora::rounded(x) << 16); }
  static void store(Floats x, Number* to) { qlora::store(x, to); }
#endif
  static Word word(const uint16_t* at) { return load<Word>(at); }
};
template <typename Element>
using Terms = std::conditional_t<std::is_same_v<Element, uint16_t>, Pairs, Singles<Element>>;
#else
template <typename Element>
using Terms = Singles<Element>;
#endif

}  // namespace qlora
