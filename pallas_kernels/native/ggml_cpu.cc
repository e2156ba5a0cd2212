// Products with frozen weights in blocks of ggml or of other files' codes: two XLA FFI handlers.
//
//   ggml_dequantize:  w[n, k] of one weight, in f32, rounded once if the result is bf16
//   ggml_rows:        y[m, n] = sum_k x[m, k] w[n, k], in f32, for few rows; one block of w exists at a time
//
// The formats are those of pallas_kernels/formats/ggml_blocks.py, with the same bits: every product of a scale and a
// code is exact in f32, and at most one addition rounds.
//
// A weight is a stack and an index, so that no slice is copied. All leading axes of the stack count as one.

#include "handler.h"

namespace ffi = xla::ffi;

namespace qlora {
namespace {

// ---- numbers

inline float float_of(uint32_t bits) { return load<float>(&bits); }

// Half-precision numbers are exact in f32. Those below 2^-14 are integers times 2^-24, because their bits, shifted,
// would be subnormal in f32, which XLA's threads take for 0.
inline float half(const uint8_t* at) {
  const uint32_t bits = load<uint16_t>(at), magnitude = bits & 0x7fff;
  const uint32_t up = magnitude < 0x7c00 ? 112u << 23 : 224u << 23;  // of the exponent; infinities and NaN stay so
  const float small = static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f;
  const uint32_t found = magnitude < 0x400 ? load<uint32_t>(&small) : (magnitude << 13) + up;
  return float_of(found | (bits & 0x8000) << 16);
}

// ---- blocks: `decode` calls emit(at, weights) for every kLanes weights of one block, which begin at `at`

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
    const float scale = half(block), minimum = kMinimum ? half(block + 2) : 0.0f;
    const Integers fifth = all(kHigh ? load<int32_t>(block + kHighAt) : 0);
#pragma GCC unroll 8
    for (int at = 0; at < kWeights; at += kLanes) {
      const Integers packed = load_bytes(block + kCodesAt + at % 16);
      Integers codes = at < 16 ? packed & 15 : packed >> 4;
      if (kHigh) codes |= ((fifth >> (lane_numbers() + at)) & 1) << 4;
      const Floats product = scale * converted(codes - kOffset);
      emit(at, kMinimum ? product + minimum : product);
    }
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
#pragma GCC unroll 8
    for (int64_t l = 0; l < kWeights; l += kLanes) {
      const Integers codes = load_bytes(block + 2 + l);
      emit(l, scale * converted((codes ^ 128) - 128));  // bytes are signed
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
#pragma GCC unroll 8
      for (int64_t l = 0; l < 32; l += kLanes) {
        const int packed = block[2 * part + l / 16];
        const float scale = of_all * static_cast<float>(packed & 15);
        const float minimum = of_minima * static_cast<float>(packed >> 4);
        const Integers codes = (load_bytes(block + 16 + 32 * (part / 4) + l) >> 2 * (part % 4)) & 3;
        emit(32 * part + l, scale * converted(codes) - minimum);
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
#pragma GCC unroll 8
      for (int64_t l = 0; l < 32; l += kLanes) {
        const Integers low = (load_bytes(block + 32 + 32 * (part / 4) + l) >> 2 * (part % 4)) & 3;
        const Integers high = (load_bytes(block + l) >> part) & 1;
        const float scale = of_all * static_cast<float>(scale_of(block + 96, 2 * part + l / 16));
        emit(32 * part + l, scale * converted((low | high << 2) - 4));
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
#pragma GCC unroll 8
      for (int64_t l = 0; l < 32; l += kLanes) {
        const Integers packed_codes = load_bytes(block + kCodesAt + 32 * (j / 2) + l);
        Integers codes = (packed_codes >> 4 * (j & 1)) & 15;
        if (kHigh) codes |= ((load_bytes(block + 16 + l) >> j) & 1) << 4;
        emit(32 * j + l, scale * converted(codes) - minimum);
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
#pragma GCC unroll 8
      for (int64_t l = 0; l < 32; l += kLanes) {
        const Integers low = load_bytes(block + 64 * side + 32 * (quarter & 1) + l);
        const Integers high = load_bytes(block + 128 + 32 * side + l);
        const Integers codes = ((low >> 4 * (quarter / 2)) & 15) | (((high >> 2 * quarter) & 3) << 4);
        const float scale = of_all * static_cast<float>(load<int8_t>(block + 192 + 2 * part + l / 16));
        emit(32 * part + l, scale * converted(codes - 32));
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
    return converted((magnitude ^ sign) - sign);
  }

  template <typename Emit>
  static void decode(const uint8_t* block, const Emit& emit) {
    const uint32_t exponent = block[0];
    const uint32_t bits = exponent < 2 ? 0x00200000u << exponent : (exponent - 1) << 23;
    const float scale = float_of(bits);
#pragma GCC unroll 8
    for (int at = 0; at < kWeights; at += kLanes) {
      const Integers packed = load_bytes(block + 1 + at % 16);
      emit(at, scale * values(at < 16 ? packed & 15 : packed >> 4));
    }
  }
};

// ggml's non-linear codes.
constexpr float kIq4Values[] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

// Emits 32 weights, whose codes are the low nibbles of 16 bytes, then the high ones.
template <typename Emit>
inline void decode_iq4(const uint8_t* codes, float scale, int begin, const Emit& emit) {
  const Table values(kIq4Values);
#pragma GCC unroll 8
  for (int at = 0; at < 32; at += kLanes) {
    const Integers packed = load_bytes(codes + at % 16);
    emit(begin + at, scale * values[at < 16 ? packed & 15 : packed >> 4]);
  }
}

struct Iq4Nl {
  static constexpr int64_t kWeights = 32, kBytes = 18;

  template <typename Emit>
  static void decode(const uint8_t* block, const Emit& emit) {
    decode_iq4(block + 2, half(block), 0, emit);
  }
};

// Eight groups of 32 weights, each with a scale of 6 bits.
struct Iq4Xs {
  static constexpr int64_t kWeights = 256, kBytes = 136;

  template <typename Emit>
  static void decode(const uint8_t* block, const Emit& emit) {
    const float of_all = half(block);
    const int high = load<uint16_t>(block + 2);
    for (int j = 0; j < 8; ++j) {
      const int scale = ((block[4 + j / 2] >> 4 * (j % 2)) & 15) | ((high >> 2 * j) & 3) << 4;
      decode_iq4(block + 8 + 16 * j, of_all * static_cast<float>(scale - 32), 32 * j, emit);
    }
  }
};

// Numbers of e4m3. Those below 2^-6 are integers times 2^-9; 127 is not a number.
inline Floats e4m3(Integers codes) {
  const Integers size = codes & 127;
  const Integers large = size == 127 ? all(0x7fc00000) : (size << 20) + (120 << 23);
  return floats_of((size < 8 ? bits_of(converted(size) * 0x1p-9f) : large) | (codes & 128) << 24);
}
inline float e4m3(uint8_t code) {
  const int size = code & 127;
  const float large = float_of(size == 127 ? 0x7fc00000 : (size << 20) + (120 << 23));
  const float magnitude = size < 8 ? static_cast<float>(size) * 0x1p-9f : large;
  return code & 128 ? -magnitude : magnitude;
}

// The f32 scale of the tensor, scales of e4m3 for 16 weights each, and values of E2M1. kInverse: the first divides.
template <int64_t kSize, bool kInverse>
struct Nvfp4 {
  static constexpr int64_t kWeights = kSize, kCodesAt = 4 + kSize / 16, kBytes = kCodesAt + kSize / 2;

  template <typename Emit>
  static void decode(const uint8_t* block, const Emit& emit) {
    const float of_tensor = load<float>(block);
#pragma GCC unroll 2
    for (int group = 0; group < kSize / 16; ++group) {
      const float of_group = e4m3(block[4 + group]);
      const float scale = kInverse ? of_group / of_tensor : of_group * of_tensor;
#pragma GCC unroll 4
      for (int at = 0; at < 16; at += kLanes) {
        const Integers packed = load_bytes(block + kCodesAt + group / 2 * 16 + at);
        emit(16 * group + at, scale * (Mxfp4::values(group % 2 ? packed >> 4 : packed & 15) * 0.5f));
      }
    }
  }
};

// An f32 scale, and numbers of e4m3.
template <int64_t kSize>
struct Fp8 {
  static constexpr int64_t kWeights = kSize, kBytes = 4 + kSize;

  template <typename Emit>
  static void decode(const uint8_t* block, const Emit& emit) {
    const float scale = load<float>(block);
#pragma GCC unroll 8
    for (int at = 0; at < kWeights; at += kLanes) emit(at, scale * e4m3(load_bytes(block + 4 + at)));
  }
};

// A group of integers with one scale and one zero. Every 16 bytes of 4-bit codes are 32 weights, low nibbles first.
template <int kBits, int64_t kGroup, bool kBfloat16>
struct Group {
  static constexpr int64_t kWeights = kGroup, kBytes = 3 + kGroup * kBits / 8;

  template <typename Emit>
  static void decode(const uint8_t* block, const Emit& emit) {
    const float scale = kBfloat16 ? number(load<uint16_t>(block)) : half(block);
    const int32_t zero = block[2];
#pragma GCC unroll 32
    for (int at = 0; at < kWeights; at += kLanes) {
      const Integers packed = load_bytes(block + 3 + (kBits == 8 ? at : at / 32 * 16 + at % 16));
      const Integers codes = kBits == 8 ? packed : at % 32 < 16 ? packed & 15 : packed >> 4;
      emit(at, scale * converted(codes - zero));
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
    case 20: return work(Iq4Nl());
    case 23: return work(Iq4Xs());
    case 39: return work(Mxfp4());
    case 1032: return work(Group<4, 32, false>());
    case 1064: return work(Group<4, 64, false>());
    case 1128: return work(Group<4, 128, false>());
    case 2032: return work(Group<4, 32, true>());
    case 2064: return work(Group<4, 64, true>());
    case 2128: return work(Group<4, 128, true>());
    case 3032: return work(Group<8, 32, false>());
    case 3064: return work(Group<8, 64, false>());
    case 3128: return work(Group<8, 128, false>());
    case 4032: return work(Group<8, 32, true>());
    case 4064: return work(Group<8, 64, true>());
    case 4128: return work(Group<8, 128, true>());
    case 5032: return work(Nvfp4<32, false>());
    case 5064: return work(Nvfp4<64, false>());
    case 5256: return work(Nvfp4<256, false>());
    case 6032: return work(Nvfp4<32, true>());
    case 6064: return work(Nvfp4<64, true>());
    case 6256: return work(Nvfp4<256, true>());
    case 7032: return work(Fp8<32>());
    case 7064: return work(Fp8<64>());
    case 7128: return work(Fp8<128>());
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
  in_parallel(pool, parts, [&](int64_t part) { rows(part * grain, std::min(w.n, (part + 1) * grain)); });
}

template <typename Format, typename Out>
void dequantize_rows(const Weight& w, Out* out, int64_t first, int64_t last) {
  const int64_t blocks = w.row_bytes / Format::kBytes;  // of each row; rows follow each other without a gap
  for (int64_t block = first * blocks; block < last * blocks; ++block) {
    Out* to = out + block * Format::kWeights;
    Format::decode(w.codes + block * Format::kBytes, [to](int64_t at, Floats values) { store(values, to + at); });
  }
}


constexpr int kMostRows = 4;                  // rows whose sums fit the registers
constexpr int kChains = kLanes == 8 ? 2 : 4;  // sums of each result, so that additions overlap; AVX2 has 16 registers

template <typename Format, int M, typename Out>
void multiply_rows(const Weight& w, int64_t k, const float* x, Out* y, int64_t first, int64_t last) {
  const int64_t blocks = w.row_bytes / Format::kBytes;
  for (int64_t n = first; n < last; ++n) {
    Floats sums[M][kChains] = {};
    for (int64_t block = 0; block < blocks; ++block) {
      const float* from = x + block * Format::kWeights;
      Format::decode(w.codes + n * w.row_bytes + block * Format::kBytes, [&](int64_t at, Floats values) {
        for (int m = 0; m < M; ++m) {
          Floats& lanes = sums[m][at / kLanes % kChains];
          lanes = multiply_add(values, load(from + m * k + at), lanes);
        }
      });
    }
    for (int m = 0; m < M; ++m) {
      for (int i = 1; i < kChains; ++i) sums[m][0] += sums[m][i];
      put(sum(sums[m][0]), y + m * w.n + n);
    }
  }
}

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
  Buffer<float> x_MK = in_f32(x);
  const int64_t m = x.dimensions()[0], k = x.dimensions()[1];
  return with_format(ggml_type, [&](auto format) {
    using Format = decltype(format);
    over_rows(pool, w, k, [&](int64_t first, int64_t last) {
      if (y->element_type() == ffi::F32)
        multiply<Format>(w, m, k, x_MK.get(), reinterpret_cast<float*>(y->untyped_data()), first, last);
      else
        multiply<Format>(w, m, k, x_MK.get(), reinterpret_cast<uint16_t*>(y->untyped_data()), first, last);
    });
    return ffi::Error::Success();
  });
}

}  // namespace
}  // namespace qlora

#define GGML_WEIGHT_ARGUMENTS     \
  Arg<ffi::Buffer<ffi::U8>>()     \
      .Arg<ffi::Buffer<ffi::S32>>() \
      .Ret<ffi::AnyBuffer>()      \
      .Attr<int64_t>("ggml_type")

QLORA_HANDLER(ggml_dequantize, qlora::dequantize, ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().GGML_WEIGHT_ARGUMENTS);
QLORA_HANDLER(ggml_rows, qlora::rows,
              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::AnyBuffer>().GGML_WEIGHT_ARGUMENTS);
