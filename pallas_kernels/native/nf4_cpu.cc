// Products with frozen 4-bit weights on CPUs with AVX-512, or AVX2 and FMA: two XLA FFI handlers.
//
//   dequantize:  w[n, k] = table[code(n, k)] * absmax[n, k / block], in f32, rounded once if the result is bf16
//   rows:        y[m, n] = sum_k x[m, k] w[n, k], in f32, for few rows; w exists only in registers
//
// Codes are row-planar (pallas_kernels/formats/layouts.py): byte [i, k] holds code(i, k) in its high and
// code(i + N/2, k) in its low nibble, so one load of 16 bytes gives 16 neighbours of two rows. Constants are f32, or
// double-quantized: absmax = map[byte] * nested[block / nested_size] + offset, in two roundings (never one fused
// multiply-add: build with -ffp-contract=off), as in bitsandbytes.
//
// A weight is a stack and the index of a layer, so that no slice is copied.

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "parallel.h"

namespace ffi = xla::ffi;

namespace {

// 16 lanes of f32. `Table` has the 16 values of the codes.
#if defined(__AVX512F__)
struct Lanes {
  __m512 v;
};
struct Table {
  __m512 v;
  explicit Table(const float* values) : v(_mm512_loadu_ps(values)) {}
};
struct Codes {
  __m512i v;  // a byte of codes in each lane
};
inline Codes load_codes(const uint8_t* at) {
  return {_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)))};
}
// The permutation reads only the low four bits of an index.
inline Lanes look_up_high(const Table& table, Codes codes) {
  return {_mm512_permutexvar_ps(_mm512_srli_epi32(codes.v, 4), table.v)};
}
inline Lanes look_up_low(const Table& table, Codes codes) { return {_mm512_permutexvar_ps(codes.v, table.v)}; }
inline Lanes load(const float* at) { return {_mm512_loadu_ps(at)}; }
inline Lanes zero() { return {_mm512_setzero_ps()}; }
inline Lanes times(Lanes a, float b) { return {_mm512_mul_ps(a.v, _mm512_set1_ps(b))}; }
inline Lanes multiply_add(Lanes a, Lanes b, Lanes c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline float sum(Lanes a) { return _mm512_reduce_add_ps(a.v); }
inline void store(Lanes a, float* to) { _mm512_storeu_ps(to, a.v); }
inline void store(Lanes a, uint16_t* to) {  // as bf16, rounded to nearest even
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(_mm512_srli_epi32(up, 16)));
}
#elif defined(__AVX2__) && defined(__FMA__)
struct Lanes {
  __m256 a, b;
};
struct Table {
  __m256 below, above;  // codes 0 to 7, codes 8 to 15
  explicit Table(const float* values) : below(_mm256_loadu_ps(values)), above(_mm256_loadu_ps(values + 8)) {}
};
struct Codes {
  __m256i a, b;
};
inline Codes load_codes(const uint8_t* at) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
  return {_mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8))};
}
// The permutation reads the low three bits of an index; the fourth, shifted to the sign, selects one of the halves.
inline __m256 look_up(const Table& table, __m256i index) {
  const __m256 below = _mm256_permutevar8x32_ps(table.below, index);
  const __m256 above = _mm256_permutevar8x32_ps(table.above, index);
  return _mm256_blendv_ps(below, above, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
}
inline Lanes look_up_high(const Table& table, Codes codes) {
  return {look_up(table, _mm256_srli_epi32(codes.a, 4)), look_up(table, _mm256_srli_epi32(codes.b, 4))};
}
inline Lanes look_up_low(const Table& table, Codes codes) { return {look_up(table, codes.a), look_up(table, codes.b)}; }
inline Lanes load(const float* at) { return {_mm256_loadu_ps(at), _mm256_loadu_ps(at + 8)}; }
inline Lanes zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Lanes times(Lanes x, float y) {
  const __m256 all = _mm256_set1_ps(y);
  return {_mm256_mul_ps(x.a, all), _mm256_mul_ps(x.b, all)};
}
inline Lanes multiply_add(Lanes x, Lanes y, Lanes z) {
  return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
inline float sum(Lanes x) {
  float lanes[8];
  _mm256_storeu_ps(lanes, _mm256_add_ps(x.a, x.b));
  return ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
}
inline void store(Lanes x, float* to) {
  _mm256_storeu_ps(to, x.a);
  _mm256_storeu_ps(to + 8, x.b);
}
inline __m256i rounded(__m256 x) {  // bf16 to nearest even, in the low half of each lane
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  return _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
}
inline void store(Lanes x, uint16_t* to) {
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded(x.a), rounded(x.b)), 0b11011000);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), packed);
}
#else
#error "this processor has neither AVX-512 nor AVX2 with FMA"
#endif

constexpr int64_t kLanes = 16;

// One layer of a stack of weights [N, K].
struct Weight {
  int64_t n, k, blocks, block_size, nested_size;
  const uint8_t* codes;
  const float* absmax;          // either this [N, blocks] ...
  const uint8_t* absmax_codes;  // ... or these, with their map and nested constants
  const float* nested;
  float offset;
  const float* map;
  const float* table;

  float constant(int64_t row, int64_t block) const {
    const int64_t at = row * blocks + block;
    if (absmax != nullptr) return absmax[at];
    const float product = map[absmax_codes[at]] * nested[at / nested_size];
    return product + offset;
  }
};

// Calls rows(first, last) in parallel for ranges of the N / 2 pairs of rows.
template <typename Rows>
void over_row_pairs(ffi::ThreadPool& pool, const Weight& w, const Rows& rows) {
  const int64_t pairs = w.n / 2;
  const int64_t grain = std::max<int64_t>(1, 32768 / w.k);  // pairs of rows per part: 65,536 weights, some microseconds
  const int64_t parts = (pairs + grain - 1) / grain;
  qlora::in_parallel(pool, parts, [&](int64_t part) { rows(part * grain, std::min(pairs, (part + 1) * grain)); });
}

template <typename Out>
void dequantize_pairs(const Weight& w, Out* out, int64_t first, int64_t last) {
  const Table table(w.table);
  for (int64_t i = first; i < last; ++i) {
    const uint8_t* codes = w.codes + i * w.k;
    Out* high = out + i * w.k;
    Out* low = out + (i + w.n / 2) * w.k;
    for (int64_t block = 0; block < w.blocks; ++block) {
      const float scale_high = w.constant(i, block), scale_low = w.constant(i + w.n / 2, block);
      for (int64_t k = block * w.block_size; k < (block + 1) * w.block_size; k += kLanes) {
        const Codes c = load_codes(codes + k);
        store(times(look_up_high(table, c), scale_high), high + k);
        store(times(look_up_low(table, c), scale_low), low + k);
      }
    }
  }
}

inline void put(float value, float* to) { *to = value; }
inline void put(float value, uint16_t* to) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  *to = static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

template <int M, typename Out>
void rows_of_pairs(const Weight& w, const float* x, Out* y, int64_t first, int64_t last) {
  const Table table(w.table);
  for (int64_t i = first; i < last; ++i) {
    const uint8_t* codes = w.codes + i * w.k;
    Lanes high[M], low[M];
    for (int m = 0; m < M; ++m) high[m] = low[m] = zero();
    for (int64_t block = 0; block < w.blocks; ++block) {
      const float scale_high = w.constant(i, block), scale_low = w.constant(i + w.n / 2, block);
      for (int64_t k = block * w.block_size; k < (block + 1) * w.block_size; k += kLanes) {
        const Codes c = load_codes(codes + k);
        const Lanes w_high = times(look_up_high(table, c), scale_high);
        const Lanes w_low = times(look_up_low(table, c), scale_low);
        for (int m = 0; m < M; ++m) {
          const Lanes x_m = load(x + m * w.k + k);
          high[m] = multiply_add(w_high, x_m, high[m]);
          low[m] = multiply_add(w_low, x_m, low[m]);
        }
      }
    }
    for (int m = 0; m < M; ++m) {
      put(sum(high[m]), y + m * w.n + i);
      put(sum(low[m]), y + m * w.n + i + w.n / 2);
    }
  }
}

constexpr int64_t kMostRows = 4;  // rows whose sums fit the registers

template <typename Out>
void rows_at_once(const Weight& w, int64_t m, const float* x, Out* y, int64_t first, int64_t last) {
  for (; m >= kMostRows; m -= kMostRows, x += kMostRows * w.k, y += kMostRows * w.n)
    rows_of_pairs<kMostRows>(w, x, y, first, last);
  if (m == 3) rows_of_pairs<3>(w, x, y, first, last);
  if (m == 2) rows_of_pairs<2>(w, x, y, first, last);
  if (m == 1) rows_of_pairs<1>(w, x, y, first, last);
}

std::vector<float> in_f32(const ffi::AnyBuffer& x) {
  std::vector<float> out(x.element_count());
  if (x.element_type() == ffi::F32) {
    std::memcpy(out.data(), x.untyped_data(), out.size() * sizeof(float));
    return out;
  }
  const uint16_t* from = reinterpret_cast<const uint16_t*>(x.untyped_data());
  for (size_t i = 0; i < out.size(); ++i) {
    const uint32_t bits = static_cast<uint32_t>(from[i]) << 16;
    std::memcpy(&out[i], &bits, 4);
  }
  return out;
}

// codes [L, N/2, K], scales [L, N, K/block] (f32, or u8 if double-quantized), nested [L, nested blocks], offset [L],
// layer [], table [16], map [256]. The Python side ensures that shapes agree.
ffi::ErrorOr<Weight> weight_of(ffi::Buffer<ffi::U8> codes, ffi::AnyBuffer scales, ffi::Buffer<ffi::F32> nested,
                               ffi::Buffer<ffi::F32> offset, ffi::Buffer<ffi::S32> layer, ffi::Buffer<ffi::F32> table,
                               ffi::Buffer<ffi::F32> map, int64_t nested_size) {
  const auto shape = codes.dimensions();
  const int64_t index = std::clamp<int64_t>(*layer.typed_data(), 0, shape[0] - 1);  // as in XLA's dynamic slices
  Weight w{};
  w.n = 2 * shape[1];
  w.k = shape[2];
  w.blocks = scales.dimensions()[2];
  w.block_size = w.k / w.blocks;
  w.nested_size = nested_size;
  if (w.block_size % kLanes != 0 || w.block_size * w.blocks != w.k)
    return ffi::Unexpected(ffi::Error::InvalidArgument("blocks must be whole and of a multiple of 16 weights"));
  w.codes = codes.typed_data() + index * shape[1] * shape[2];
  w.table = table.typed_data();
  w.map = map.typed_data();
  if (scales.element_type() == ffi::F32) {
    w.absmax = reinterpret_cast<const float*>(scales.untyped_data()) + index * w.n * w.blocks;
  } else {
    w.absmax_codes = reinterpret_cast<const uint8_t*>(scales.untyped_data()) + index * w.n * w.blocks;
    w.nested = nested.typed_data() + index * nested.dimensions()[1];
    w.offset = offset.typed_data()[index];
  }
  return w;
}

ffi::Error dequantize(ffi::ThreadPool pool, ffi::Buffer<ffi::U8> codes, ffi::AnyBuffer scales,
                      ffi::Buffer<ffi::F32> nested, ffi::Buffer<ffi::F32> offset, ffi::Buffer<ffi::S32> layer,
                      ffi::Buffer<ffi::F32> table, ffi::Buffer<ffi::F32> map, ffi::Result<ffi::AnyBuffer> out,
                      int64_t nested_size) {
  const auto found = weight_of(codes, scales, nested, offset, layer, table, map, nested_size);
  if (found.has_error()) return found.error();
  const Weight& w = found.value();
  over_row_pairs(pool, w, [&](int64_t first, int64_t last) {
    if (out->element_type() == ffi::F32)
      dequantize_pairs(w, reinterpret_cast<float*>(out->untyped_data()), first, last);
    else
      dequantize_pairs(w, reinterpret_cast<uint16_t*>(out->untyped_data()), first, last);
  });
  return ffi::Error::Success();
}

ffi::Error rows(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Buffer<ffi::U8> codes, ffi::AnyBuffer scales,
                ffi::Buffer<ffi::F32> nested, ffi::Buffer<ffi::F32> offset, ffi::Buffer<ffi::S32> layer,
                ffi::Buffer<ffi::F32> table, ffi::Buffer<ffi::F32> map, ffi::Result<ffi::AnyBuffer> y,
                int64_t nested_size) {
  const auto found = weight_of(codes, scales, nested, offset, layer, table, map, nested_size);
  if (found.has_error()) return found.error();
  const Weight& w = found.value();
  const std::vector<float> x_MK = in_f32(x);
  const int64_t m = x.dimensions()[0];
  over_row_pairs(pool, w, [&](int64_t first, int64_t last) {
    if (y->element_type() == ffi::F32)
      rows_at_once(w, m, x_MK.data(), reinterpret_cast<float*>(y->untyped_data()), first, last);
    else
      rows_at_once(w, m, x_MK.data(), reinterpret_cast<uint16_t*>(y->untyped_data()), first, last);
  });
  return ffi::Error::Success();
}

}  // namespace

#define NF4_WEIGHT_ARGUMENTS      \
  Arg<ffi::Buffer<ffi::U8>>()     \
      .Arg<ffi::AnyBuffer>()      \
      .Arg<ffi::Buffer<ffi::F32>>() \
      .Arg<ffi::Buffer<ffi::F32>>() \
      .Arg<ffi::Buffer<ffi::S32>>() \
      .Arg<ffi::Buffer<ffi::F32>>() \
      .Arg<ffi::Buffer<ffi::F32>>() \
      .Ret<ffi::AnyBuffer>()      \
      .Attr<int64_t>("nested_size")

XLA_FFI_DEFINE_HANDLER_SYMBOL(nf4_dequantize, dequantize,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().NF4_WEIGHT_ARGUMENTS);
XLA_FFI_DEFINE_HANDLER_SYMBOL(nf4_rows, rows,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::AnyBuffer>().NF4_WEIGHT_ARGUMENTS);
