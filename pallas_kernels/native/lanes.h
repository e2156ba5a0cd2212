// Vectors of 32-bit lanes, as wide as the variant's registers, and what operators on them cannot say.
//
// Floats and Integers are vector types of GCC and Clang: + - * / & | ^ << >> and comparisons work on them, and a
// comparison gives lanes of -1 or 0, with which `mask ? a : b` selects. Sums of products never fuse by themselves
// (-ffp-contract=off): `multiply_add` rounds once.

#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#else
#error "there are loops for x86-64 and 64-bit ARM"
#endif

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace qlora {

#if defined(__AVX512F__)
constexpr int64_t kLanes = 16;
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int64_t kLanes = 8;
#elif defined(__ARM_NEON)
constexpr int64_t kLanes = 4;
#else
#error "x86-64 processors need AVX2 and FMA"
#endif

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Integers __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Unsigned __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Shorts __attribute__((vector_size(2 * kLanes)));  // bf16 numbers
typedef uint8_t Bytes __attribute__((vector_size(kLanes)));

template <typename T>
inline T load(const void* at) {
  T value;
  std::memcpy(&value, at, sizeof value);
  return value;
}
inline Floats load(const float* at) { return load<Floats>(at); }
inline Floats all(float x) { return x - Floats{}; }  // a sum with 0 would have to change -0
inline Integers all(int32_t x) { return Integers{} + x; }
inline Integers bits_of(Floats x) { return load<Integers>(&x); }
inline Floats floats_of(Integers bits) { return load<Floats>(&bits); }
inline Floats converted(Integers x) { return __builtin_convertvector(x, Floats); }
inline Integers lane_numbers() {
  Integers numbers{};
  for (int i = 0; i < kLanes; ++i) numbers[i] = i;
  return numbers;
}

// ---- what has an instruction of its own

#if defined(__AVX512F__)
inline Floats multiply_add(Floats a, Floats b, Floats c) {
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
inline Floats max(Floats a, Floats b) { return (Floats)_mm512_max_ps((__m512)a, (__m512)b); }
inline float sum(Floats x) { return _mm512_reduce_add_ps((__m512)x); }
inline float greatest(Floats x) { return _mm512_reduce_max_ps((__m512)x); }
inline Integers widened(Bytes x) { return (Integers)_mm512_cvtepu8_epi32((__m128i)x); }
inline Integers widened(Shorts x) { return (Integers)_mm512_cvtepu16_epi32((__m256i)x); }
inline void pause() { _mm_pause(); }
#elif defined(__AVX2__)
inline Floats multiply_add(Floats a, Floats b, Floats c) {
  return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
inline Floats max(Floats a, Floats b) { return (Floats)_mm256_max_ps((__m256)a, (__m256)b); }
inline float sum(Floats x) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline float greatest(Floats x) {
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
inline Integers widened(Bytes x) { return (Integers)_mm256_cvtepu8_epi32(_mm_loadu_si64(&x)); }
inline Integers widened(Shorts x) { return (Integers)_mm256_cvtepu16_epi32((__m128i)x); }
inline void pause() { _mm_pause(); }
#else
inline Floats multiply_add(Floats a, Floats b, Floats c) {
  return (Floats)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
inline Integers widened(Bytes x) { return __builtin_convertvector(x, Integers); }
inline Integers widened(Shorts x) { return __builtin_convertvector(x, Integers); }
inline Floats max(Floats a, Floats b) { return (Floats)vmaxq_f32((float32x4_t)a, (float32x4_t)b); }
inline float sum(Floats x) { return vaddvq_f32((float32x4_t)x); }
inline float greatest(Floats x) { return vmaxvq_f32((float32x4_t)x); }
inline void pause() { __asm__ __volatile__("yield"); }
#endif

// to[i] = sum(x[i]) for i below C, with the same additions.
template <int C>
inline void totals_of(const Floats* x, float* to) {
#if defined(__AVX512F__)
  if constexpr (C >= 8) {
    constexpr int kTo = C > 8 ? 16 : 8;  // one vector has the sums of 16, or 8 twice
    __m512 halves[8], quarters[4], pairs[2];
#pragma GCC unroll 8
    for (int i = 0; i < kTo / 2; ++i) {
      const __m512 a = (__m512)x[std::min(2 * i, C - 1)], b = (__m512)x[std::min(2 * i + 1, C - 1)];
      halves[i] = _mm512_shuffle_f32x4(a, b, 0x44) + _mm512_shuffle_f32x4(a, b, 0xee);
    }
#pragma GCC unroll 4
    for (int i = 0; i < kTo / 4; ++i) {
      const __m512 a = halves[2 * i], b = halves[2 * i + 1];
      quarters[i] = _mm512_shuffle_f32x4(a, b, 0x88) + _mm512_shuffle_f32x4(a, b, 0xdd);
    }
#pragma GCC unroll 2
    for (int i = 0; i < kTo / 8; ++i) {
      const __m512 a = quarters[2 * i], b = quarters[2 * i + 1];
      pairs[i] = _mm512_shuffle_ps(a, b, 0x44) + _mm512_shuffle_ps(a, b, 0xee);
    }
    const __m512 a = pairs[0], b = pairs[kTo / 8 - 1];
    const __m512 mixed = _mm512_shuffle_ps(a, b, 0x88) + _mm512_shuffle_ps(a, b, 0xdd);
    // The sum of vector 4 q + j is at 4 j + q.
    const __m512i places = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    _mm512_mask_storeu_ps(to, C < 16 ? (1 << C) - 1 : 0xffff, _mm512_permutexvar_ps(places, mixed));
    if constexpr (C > 16) totals_of<C - 16>(x + 16, to + 16);
    return;
  }
#endif
#pragma GCC unroll 16
  for (int i = 0; i < C; ++i) to[i] = sum(x[i]);
}

inline Integers load_bytes(const uint8_t* at) { return widened(load<Bytes>(at)); }

// 16 numbers, looked up by the low four bits of each lane.
struct Table {
#if defined(__AVX512F__)
  __m512 numbers;
  explicit Table(const float* at) : numbers(_mm512_loadu_ps(at)) {}
  Floats operator[](Integers codes) const { return (Floats)_mm512_permutexvar_ps((__m512i)codes, numbers); }
#elif defined(__AVX2__)
  __m256 below, above;  // codes 0 to 7, codes 8 to 15
  explicit Table(const float* at) : below(_mm256_loadu_ps(at)), above(_mm256_loadu_ps(at + 8)) {}
  // The permutation reads the low three bits of a code; the fourth, shifted to the sign, selects one of the halves.
  Floats operator[](Integers codes) const {
    const __m256i index = (__m256i)codes;
    const __m256 low = _mm256_permutevar8x32_ps(below, index), high = _mm256_permutevar8x32_ps(above, index);
    return (Floats)_mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
  }
#else
  uint8x16x4_t numbers;
  explicit Table(const float* at) { std::memcpy(&numbers, at, sizeof numbers); }
  Floats operator[](Integers codes) const {  // byte i of number c is byte 4 c + i of the table
    const Integers index = (codes & 15) * 0x04040404 + 0x03020100;
    return (Floats)vqtbl4q_u8(numbers, (uint8x16_t)index);
  }
#endif
};

// The numbers of such a table that the high or the low nibbles of kVectors * kLanes bytes stand for, in their order.
struct NibbleTable {
#if defined(__AVX2__) && !defined(__AVX512F__)
  static constexpr int kVectors = 4;
  __m256i planes[4];  // byte i of every number, in both halves: look-ups of bytes find 32 of them at once
  explicit NibbleTable(const float* at) {
    uint8_t bytes[4][16];
    for (int i = 0; i < 16; ++i)
      for (int j = 0; j < 4; ++j) bytes[j][i] = reinterpret_cast<const uint8_t*>(at + i)[j];
    for (int j = 0; j < 4; ++j) planes[j] = _mm256_broadcastsi128_si256(load<__m128i>(bytes[j]));
  }
  using Codes = __m256i;
  // Unpacking gives every vector four neighbours from each half, so the halves get every other four bytes.
  static Codes codes(const uint8_t* at) {
    return _mm256_permutevar8x32_epi32(load<__m256i>(at), _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7));
  }
  void high(Codes codes, Floats (&to)[kVectors]) const { low(_mm256_srli_epi16(codes, 4), to); }
  void low(Codes codes, Floats (&to)[kVectors]) const {
    const __m256i index = _mm256_and_si256(codes, _mm256_set1_epi8(15));
    const __m256i a = _mm256_shuffle_epi8(planes[0], index), b = _mm256_shuffle_epi8(planes[1], index);
    const __m256i c = _mm256_shuffle_epi8(planes[2], index), d = _mm256_shuffle_epi8(planes[3], index);
    const __m256i first_ab = _mm256_unpacklo_epi8(a, b), second_ab = _mm256_unpackhi_epi8(a, b);
    const __m256i first_cd = _mm256_unpacklo_epi8(c, d), second_cd = _mm256_unpackhi_epi8(c, d);
    to[0] = (Floats)_mm256_unpacklo_epi16(first_ab, first_cd);
    to[1] = (Floats)_mm256_unpackhi_epi16(first_ab, first_cd);
    to[2] = (Floats)_mm256_unpacklo_epi16(second_ab, second_cd);
    to[3] = (Floats)_mm256_unpackhi_epi16(second_ab, second_cd);
  }
#else
  static constexpr int kVectors = 1;
  Table table;
  explicit NibbleTable(const float* at) : table(at) {}
  using Codes = Integers;
  static Codes codes(const uint8_t* at) { return load_bytes(at); }
  void high(Codes codes, Floats (&to)[kVectors]) const { to[0] = table[codes >> 4]; }
  void low(Codes codes, Floats (&to)[kVectors]) const { to[0] = table[codes]; }
#endif
};

#if defined(__AVX512F__)
// 256 numbers, looked up by the low eight bits of each lane: an instruction looks up 32, and the upper bits select.
struct LargeTable {
  __m512 numbers[16];
  explicit LargeTable(const float* at) { std::memcpy(numbers, at, sizeof numbers); }
  Floats operator[](Integers codes) const {
    const __m512i index = (__m512i)codes;
    __m512 found[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) found[i] = _mm512_permutex2var_ps(numbers[2 * i], index, numbers[2 * i + 1]);
#pragma GCC unroll 3
    for (int bit = 5, count = 4; bit < 8; ++bit, count /= 2) {
      const __mmask16 upper = _mm512_test_epi32_mask(index, _mm512_set1_epi32(1 << bit));
#pragma GCC unroll 4
      for (int i = 0; i < count; ++i) found[i] = _mm512_mask_blend_ps(upper, found[2 * i], found[2 * i + 1]);
    }
    return (Floats)found[0];
  }
};
#endif

// ---- numbers in memory: f32, bf16 as 16 bits, or 8-bit integers

inline Floats load(const uint16_t* at) {
  return floats_of(widened(load<Shorts>(at)) << 16);
}
inline Floats load(const int8_t* at) {
  return converted((load_bytes(reinterpret_cast<const uint8_t*>(at)) ^ 128) - 128);
}
inline float number(float x) { return x; }
inline float number(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  return load<float>(&bits);
}
// The bits of bf16 numbers, rounded to nearest even, in the low halves of lanes.
inline Integers rounded(Floats x) {
  const Unsigned bits = (Unsigned)bits_of(x);
  return (Integers)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline void store(Floats x, float* to) { std::memcpy(to, &x, sizeof x); }
inline void store(Floats x, uint16_t* to) {
#if defined(__AVX512F__)
  const __m256i numbers = _mm512_cvtepi32_epi16((__m512i)rounded(x));
#elif defined(__AVX2__)
  const __m256i wide = (__m256i)rounded(x);
  const __m128i numbers = _mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
#else
  const Shorts numbers = __builtin_convertvector(rounded(x), Shorts);
#endif
  std::memcpy(to, &numbers, sizeof numbers);
}
template <typename T>
inline void store(Floats x, Floats y, T* to) {
  store(x, to);
  store(y, to + kLanes);
}
#if defined(__AVX2__) && !defined(__AVX512F__)  // one packing takes both
inline void store(Floats x, Floats y, uint16_t* to) {
  const __m256i both = _mm256_packus_epi32((__m256i)rounded(x), (__m256i)rounded(y));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permute4x64_epi64(both, 0b11011000));
}
#endif
inline void put(float x, float* to) { *to = x; }
inline void put(float x, uint16_t* to) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  *to = static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// ---- functions

// 2^f for |f| <= 1/2, by the polynomial that equals it at the Chebyshev points.
constexpr float kExp2[] = {1.0000000754548972f,  0.6931471880262273f,   0.2402210748530968f,
                           0.05550357114222094f, 0.009676031918255982f, 0.001339086336353527f};

// 2^x for x <= 0, within 3e-7; 0 far below 2^-126.
inline Floats exp2(Floats x) {
#if defined(__AVX512F__)
  const Floats nearest = (Floats)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const Floats f = x - nearest;
#else
  constexpr float kWhole = 12582912.0f;  // 1.5 * 2^23: a sum with it has no bits below 1
  const Floats above = max(x, all(-126.0f));
  const Floats nearest = (above + kWhole) - kWhole;
  const Floats f = above - nearest;
#endif
  Floats power = all(kExp2[5]);
  for (int i = 4; i >= 0; --i) power = multiply_add(power, f, all(kExp2[i]));
#if defined(__AVX512F__)
  return (Floats)_mm512_scalef_ps((__m512)power, (__m512)nearest);
#else
  const Floats scaled = floats_of(bits_of(power) + (__builtin_convertvector(nearest, Integers) << 23));
  return x < -126.0f ? Floats{} : scaled;
#endif
}

// tanh(x) = x p(x^2) for |x| < 1/2, by the polynomial that equals it at the Chebyshev points of x^2.
constexpr float kTanh[] = {1.0f, -0.33333325386047363f, 0.13332900404930115f, -0.05389322340488434f,
                           0.021273821592330933f, -0.006612014025449753f};

// tanh(x), within 2e-7.
inline Floats tanh(Floats x) {
  const Floats size = x < 0.0f ? -x : x, square = x * x;
  Floats near = all(kTanh[5]);
  for (int i = 4; i >= 0; --i) near = multiply_add(near, square, all(kTanh[i]));
  const Floats power = exp2(size * -2.8853900817779268f);  // e^(-2 |x|)
  const Floats far = (1.0f - power) / (1.0f + power);
  return size < 0.5f ? x * near : (x < 0.0f ? -far : far);
}

}  // namespace qlora
