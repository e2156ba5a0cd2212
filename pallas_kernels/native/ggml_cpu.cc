// Products with frozen weights in blocks of ggml or of INT4 groups on CPUs: two XLA FFI handlers.
//
//   ggml_dequantize:  w[n, k] of one weight, in f32, rounded once if the result is bf16
//   ggml_rows:        y[m, n] = sum_k x[m, k] w[n, k], in f32, for few rows; one block of w exists at a time
//
// The formats are those of pallas_kernels/formats/ggml_blocks.py, with the same bits: every product of a scale and a
// code is exact in f32, and at most one addition rounds.
//
// A weight is a stack and an index, so that no slice is copied. All leading axes of the stack count as one.

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "floats.h"
#include "parallel.h"

namespace ffi = xla::ffi;
using qlora::put;

namespace {

// 16 lanes. Operators on these types of GCC and Clang compile to the widest instructions of the processor.
constexpr int64_t kLanes = 16;
typedef int32_t Integers __attribute__((vector_size(64)));
typedef float Floats __attribute__((vector_size(64)));

template <typename T>
inline T load(const void* at) {
  T lanes;
  std::memcpy(&lanes, at, sizeof lanes);
  return lanes;
}
inline void store(Floats values, float* to) { std::memcpy(to, &values, sizeof values); }
inline Integers rounded(Floats values) {  // to bf16, nearest even, in the low half of each lane
  const Integers bits = load<Integers>(&values);
  return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}
#if defined(__AVX512F__)
inline Integers load_codes(const uint8_t* at) {  // a byte in each lane
  return (Integers)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
}
inline void store(Floats values, uint16_t* to) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16((__m512i)rounded(values)));
}
#elif defined(__AVX2__) && defined(__F16C__)
struct Halves {
  __m256i a, b;
};
inline Integers load_codes(const uint8_t* at) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
  const Halves halves = {_mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8))};
  return load<Integers>(&halves);
}
inline void store(Floats values, uint16_t* to) {
  const Integers lanes = rounded(values);
  const Halves halves = load<Halves>(&lanes);
  const __m256i low_halves = _mm256_set1_epi32(0xffff);
  const __m256i packed =
      _mm256_packus_epi32(_mm256_and_si256(halves.a, low_halves), _mm256_and_si256(halves.b, low_halves));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permute4x64_epi64(packed, 0b11011000));
}
#else
#error "this processor has neither AVX-512 nor AVX2 with F16C"
#endif
inline Floats to_floats(Integers codes) { return __builtin_convertvector(codes, Floats); }

inline float half(const uint8_t* at) {
  uint16_t bits;
  std::memcpy(&bits, at, 2);
  return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(bits)));
}

// ---- blocks: `decode` calls emit(at, weights) for every 16 weights of one block, which begin at `at`

// Low nibbles are the first half of the weights, high nibbles the second. kHigh: the block has the fifth bits of the
// codes, one bit each. kOffset is subtracted from a code; kMinimum: the block has a minimum, which is added.
template <bool kHigh, int kOffset, bool kMinimum>
struct Nibbles {
  static constexpr int64_t kWeights = 32;
  static constexpr int64_t kHighAt = kMinimum ? 4 : 2;
  static constexpr int64_t kCodesAt = kHighAt + (kHigh ? 4 : 0);
  static constexpr int64_t kBytes = kCodesAt + 16;

  template <typename Emit>
  static void decode(const uint8_t* block, const Emit& emit) {
    const float scale = half(block);
    const Integers packed = load_codes(block + kCodesAt);
    Integers low = packed & 15, high = packed >> 4;
    if (kHigh) {
      const Integers lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
      const Integers fifth = Integers{} + load<int32_t>(block + kHighAt);
      low |= ((fifth >> lane) & 1) << 4;
      high |= ((fifth >> (lane + 16)) & 1) << 4;
    }
    Floats first = scale * to_floats(low - kOffset), second = scale * to_floats(high - kOffset);
    if (kMinimum) {
      const float minimum = half(block + 2);
      first += minimum;
      second += minimum;
    }
    emit(0, first);
    emit(kLanes, second);
  }
};
using Q4_0 = Nibbles<false, 8, false>;
using Q4_1 = Nibbles<false, 0, true>;
using Q5_0 = Nibbles<true, 16, false>;
using Q5_1 = Nibbles<true, 0, true>;

struct Q8_0 {
  static constexpr int64_t kWeights = 32, kBytes = 34;

  template <typename Emit>
  static void decode(const uint8_t* block, const Emit& emit) {
    const float scale = half(block);
#pragma GCC unroll 2
    for (int64_t l = 0; l < kWeights; l += kLanes) {
      const Integers codes = load_codes(block + 2 + l);
      emit(l, scale * to_floats((codes ^ 128) - 128));  // bytes are signed
    }
  }
};

// Two halves of 128 weights: codes of 2 bits in 32 bytes, the first 32 of them in the lowest bits; an integer scale and
// minimum of 4 bits for every 16 weights.
struct Q2_K {
  static constexpr int64_t kWeights = 256, kBytes = 84;

  template <typename Emit>
  static void decode(const uint8_t* block, const Emit& emit) {
    const float of_all = half(block + 80), of_minima = half(block + 82);
#pragma GCC unroll 8
    for (int part = 0; part < 8; ++part) {
#pragma GCC unroll 2
      for (int64_t l = 0; l < 32; l += kLanes) {
        const int packed = block[2 * part + l / kLanes];
        const float scale = of_all * static_cast<float>(packed & 15);
        const float minimum = of_minima * static_cast<float>(packed >> 4);
        const Integers codes = (load_codes(block + 16 + 32 * (part / 4) + l) >> 2 * (part % 4)) & 3;
        emit(32 * part + l, scale * to_floats(codes) - minimum);
      }
    }
  }
};

// As Q2_K, with a third bit of each code in 32 bytes, and a scale of 6 bits for every 16 weights.
struct Q3_K {
  static constexpr int64_t kWeights = 256, kBytes = 110;

  static int scale_of(const uint8_t* packed, int i) {
    const int low = i < 8 ? packed[i] & 15 : packed[i - 8] >> 4;
    return (low | ((packed[8 + i % 4] >> 2 * (i / 4)) & 3) << 4) - 32;
  }

  template <typename Emit>
  static void decode(const uint8_t* block, const Emit& emit) {
    const float of_all = half(block + 108);
#pragma GCC unroll 8
    for (int part = 0; part < 8; ++part) {
#pragma GCC unroll 2
      for (int64_t l = 0; l < 32; l += kLanes) {
        const Integers low = (load_codes(block + 32 + 32 * (part / 4) + l) >> 2 * (part % 4)) & 3;
        const Integers high = (load_codes(block + l) >> part) & 1;
        const float scale = of_all * static_cast<float>(scale_of(block + 96, 2 * part + l / kLanes));
        emit(32 * part + l, scale * to_floats((low | high << 2) - 4));
      }
    }
  }
};

// Eight groups of 32 weights, each with an integer scale and minimum of 6 bits. kHigh: the block has fifth bits.
template <bool kHigh>
struct WithMinima {
  static constexpr int64_t kWeights = 256;
  static constexpr int64_t kCodesAt = kHigh ? 48 : 16;
  static constexpr int64_t kBytes = kCodesAt + 128;

  template <typename Emit>
  static void decode(const uint8_t* block, const Emit& emit) {
    const float of_all = half(block), of_minima = half(block + 2);
    const uint8_t* packed = block + 4;
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      const int i = j & 3;
      const int scale6 = j < 4 ? packed[i] & 63 : (packed[8 + i] & 15) | ((packed[i] >> 2) & 48);
      const int minimum6 = j < 4 ? packed[4 + i] & 63 : (packed[8 + i] >> 4) | ((packed[4 + i] >> 2) & 48);
      const float scale = of_all * static_cast<float>(scale6), minimum = of_minima * static_cast<float>(minimum6);
#pragma GCC unroll 2
      for (int64_t l = 0; l < 32; l += kLanes) {
        const Integers packed_codes = load_codes(block + kCodesAt + 32 * (j / 2) + l);
        Integers codes = (packed_codes >> 4 * (j & 1)) & 15;
        if (kHigh) codes |= ((load_codes(block + 16 + l) >> j) & 1) << 4;
        emit(32 * j + l, scale * to_floats(codes) - minimum);
      }
    }
  }
};
using Q4_K = WithMinima<false>;
using Q5_K = WithMinima<true>;

// Two halves of 128 weights: low nibbles in 64 bytes, two high bits in 32; a scale for every 16 weights.
struct Q6_K {
  static constexpr int64_t kWeights = 256, kBytes = 210;

  template <typename Emit>
  static void decode(const uint8_t* block, const Emit& emit) {
    const float of_all = half(block + 208);
#pragma GCC unroll 8
    for (int part = 0; part < 8; ++part) {
      const int side = part / 4, quarter = part % 4;
#pragma GCC unroll 2
      for (int64_t l = 0; l < 32; l += kLanes) {
        const Integers low = load_codes(block + 64 * side + 32 * (quarter & 1) + l);
        const Integers high = load_codes(block + 128 + 32 * side + l);
        const Integers codes = ((low >> 4 * (quarter / 2)) & 15) | (((high >> 2 * quarter) & 3) << 4);
        const float scale = of_all * static_cast<float>(load<int8_t>(block + 192 + 2 * part + l / kLanes));
        emit(32 * part + l, scale * to_floats(codes - 32));
      }
    }
  }
};

// A power of two, and values of E2M1. Doubled, their magnitudes are the integers 0, 1, 2, 3, 4, 6, 8, 12.
struct Mxfp4 {
  static constexpr int64_t kWeights = 32, kBytes = 17;

  static Floats values(Integers code) {
    const Integers exponent = (code >> 1) & 3;
    const Integers normal = exponent != 0;  // -1 if so, else 0
    const Integers magnitude = ((normal & 2) | (code & 1)) << (exponent + normal);
    const Integers sign = -(code >> 3);  // -1 if negative, else 0
    return to_floats((magnitude ^ sign) - sign);
  }

  template <typename Emit>
  static void decode(const uint8_t* block, const Emit& emit) {
    const uint32_t exponent = block[0];
    const uint32_t bits = exponent < 2 ? 0x00200000u << exponent : (exponent - 1) << 23;
    const float scale = load<float>(&bits);
    const Integers packed = load_codes(block + 1);
    emit(0, scale * values(packed & 15));
    emit(kLanes, scale * values(packed >> 4));
  }
};

// A group of 4-bit integers with one scale and one zero. Every 16 bytes of codes are 32 weights, low nibbles first.
template <int64_t kGroup, bool kBfloat16>
struct Int4 {
  static constexpr int64_t kWeights = kGroup, kBytes = 3 + kGroup / 2;

  static float scale_of(const uint8_t* block) {
    if (!kBfloat16) return half(block);
    const uint32_t bits = static_cast<uint32_t>(load<uint16_t>(block)) << 16;
    return load<float>(&bits);
  }

  template <typename Emit>
  static void decode(const uint8_t* block, const Emit& emit) {
    const float scale = scale_of(block);
    const int32_t zero = block[2];
#pragma GCC unroll 4
    for (int64_t l = 0; l < kWeights; l += 2 * kLanes) {
      const Integers packed = load_codes(block + 3 + l / 2);
      emit(l, scale * to_floats((packed & 15) - zero));
      emit(l + kLanes, scale * to_floats((packed >> 4) - zero));
    }
  }
};

// Calls work(Format()) with the format of a number: that of ggml's enumeration, or one of ggml_blocks.py.
template <typename Work>
ffi::Error with_format(int64_t number, const Work& work) {
  switch (number) {
    case 2: return work(Q4_0());
    case 3: return work(Q4_1());
    case 6: return work(Q5_0());
    case 7: return work(Q5_1());
    case 8: return work(Q8_0());
    case 10: return work(Q2_K());
    case 11: return work(Q3_K());
    case 12: return work(Q4_K());
    case 13: return work(Q5_K());
    case 14: return work(Q6_K());
    case 39: return work(Mxfp4());
    case 1032: return work(Int4<32, false>());
    case 1064: return work(Int4<64, false>());
    case 1128: return work(Int4<128, false>());
    case 2032: return work(Int4<32, true>());
    case 2064: return work(Int4<64, true>());
    case 2128: return work(Int4<128, true>());
  }
  return ffi::Error::InvalidArgument("unknown number of a block format");
}

// ---- one weight of a stack

struct Weight {
  int64_t n, row_bytes;
  const uint8_t* codes;
};

// codes [..., N, bytes per row], index []. The Python side ensures that rows are whole blocks.
Weight weight_of(const ffi::Buffer<ffi::U8>& codes, const ffi::Buffer<ffi::S32>& index) {
  const auto shape = codes.dimensions();
  const int64_t n = shape[shape.size() - 2], row_bytes = shape[shape.size() - 1];
  const int64_t count = static_cast<int64_t>(codes.element_count()) / (n * row_bytes);
  const int64_t at = std::clamp<int64_t>(*index.typed_data(), 0, count - 1);  // as in XLA's dynamic slices
  return {n, row_bytes, codes.typed_data() + at * n * row_bytes};
}

// Calls rows(first, last) in parallel for ranges of the N rows.
template <typename Rows>
void over_rows(ffi::ThreadPool& pool, const Weight& w, int64_t k, const Rows& rows) {
  const int64_t grain = std::max<int64_t>(1, 65536 / k);  // 65,536 weights per part, some microseconds
  const int64_t parts = (w.n + grain - 1) / grain;
  qlora::in_parallel(pool, parts, [&](int64_t part) { rows(part * grain, std::min(w.n, (part + 1) * grain)); });
}

template <typename Format, typename Out>
void dequantize_rows(const Weight& w, Out* out, int64_t first, int64_t last) {
  const int64_t blocks = w.row_bytes / Format::kBytes;  // of each row; rows follow each other without a gap
  for (int64_t block = first * blocks; block < last * blocks; ++block) {
    Out* to = out + block * Format::kWeights;
    Format::decode(w.codes + block * Format::kBytes, [to](int64_t at, Floats values) { store(values, to + at); });
  }
}

template <typename Format, int M, typename Out>
void multiply_rows(const Weight& w, int64_t k, const float* x, Out* y, int64_t first, int64_t last) {
  const int64_t blocks = w.row_bytes / Format::kBytes;
  for (int64_t n = first; n < last; ++n) {
    Floats sums[M][2] = {};  // two of each, so that additions overlap
    for (int64_t block = 0; block < blocks; ++block) {
      const float* from = x + block * Format::kWeights;
      Format::decode(w.codes + n * w.row_bytes + block * Format::kBytes, [&](int64_t at, Floats values) {
        for (int m = 0; m < M; ++m) sums[m][at / kLanes % 2] += values * load<Floats>(from + m * k + at);
      });
    }
    for (int m = 0; m < M; ++m) {
      const Floats lanes = sums[m][0] + sums[m][1];
      float sum = 0.0f;
      for (int64_t lane = 0; lane < kLanes; ++lane) sum += lanes[lane];
      put(sum, y + m * w.n + n);
    }
  }
}

constexpr int64_t kMostRows = 4;  // rows whose sums fit the registers

template <typename Format, typename Out>
void multiply(const Weight& w, int64_t m, int64_t k, const float* x, Out* y, int64_t first, int64_t last) {
  for (; m >= kMostRows; m -= kMostRows, x += kMostRows * k, y += kMostRows * w.n)
    multiply_rows<Format, kMostRows>(w, k, x, y, first, last);
  if (m == 3) multiply_rows<Format, 3>(w, k, x, y, first, last);
  if (m == 2) multiply_rows<Format, 2>(w, k, x, y, first, last);
  if (m == 1) multiply_rows<Format, 1>(w, k, x, y, first, last);
}

// ---- handlers

ffi::Error dequantize(ffi::ThreadPool pool, ffi::Buffer<ffi::U8> codes, ffi::Buffer<ffi::S32> index,
                      ffi::Result<ffi::AnyBuffer> out, int64_t ggml_type) {
  const Weight w = weight_of(codes, index);
  return with_format(ggml_type, [&](auto format) {
    using Format = decltype(format);
    over_rows(pool, w, w.row_bytes / Format::kBytes * Format::kWeights, [&](int64_t first, int64_t last) {
      if (out->element_type() == ffi::F32)
        dequantize_rows<Format>(w, reinterpret_cast<float*>(out->untyped_data()), first, last);
      else
        dequantize_rows<Format>(w, reinterpret_cast<uint16_t*>(out->untyped_data()), first, last);
    });
    return ffi::Error::Success();
  });
}

ffi::Error rows(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Buffer<ffi::U8> codes, ffi::Buffer<ffi::S32> index,
                ffi::Result<ffi::AnyBuffer> y, int64_t ggml_type) {
  const Weight w = weight_of(codes, index);
  const std::vector<float> x_MK = qlora::in_f32(x);
  const int64_t m = x.dimensions()[0], k = x.dimensions()[1];
  return with_format(ggml_type, [&](auto format) {
    using Format = decltype(format);
    over_rows(pool, w, k, [&](int64_t first, int64_t last) {
      if (y->element_type() == ffi::F32)
        multiply<Format>(w, m, k, x_MK.data(), reinterpret_cast<float*>(y->untyped_data()), first, last);
      else
        multiply<Format>(w, m, k, x_MK.data(), reinterpret_cast<uint16_t*>(y->untyped_data()), first, last);
    });
    return ffi::Error::Success();
  });
}

}  // namespace

#define GGML_WEIGHT_ARGUMENTS     \
  Arg<ffi::Buffer<ffi::U8>>()     \
      .Arg<ffi::Buffer<ffi::S32>>() \
      .Ret<ffi::AnyBuffer>()      \
      .Attr<int64_t>("ggml_type")

XLA_FFI_DEFINE_HANDLER_SYMBOL(ggml_dequantize, dequantize,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().GGML_WEIGHT_ARGUMENTS);
XLA_FFI_DEFINE_HANDLER_SYMBOL(ggml_rows, rows,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::AnyBuffer>().GGML_WEIGHT_ARGUMENTS);
