// Products with frozen 4-bit weights: three XLA FFI handlers.
//
//   dequantize:  w[n, k] = table[code(n, k)] * absmax[n, k / block], in f32, rounded once if the result is bf16
//   rows:        y[m, n] = sum_k x[m, k] w[n, k], in f32, for few rows; w exists only in registers, rounded to bf16 if x
//                is bf16 and AVX-512 multiplies pairs. If `integer`, x and the table are rounded to 8 bits, with a scale
//                for every 64 numbers of x
//   product:     the same for many rows, or, if `transposed`, x[m, k] = sum_n y[m, n] w[n, k]; w is dequantized into the
//                panels that the product reads, one chunk at a time, so that it never exists as a whole
//
// Codes are row-planar (pallas_kernels/formats/layouts.py): byte [i, k] holds code(i, k) in its high and
// code(i + N/2, k) in its low nibble, so one load of bytes gives neighbours of two rows. Constants are f32, or
// double-quantized: absmax = map[byte] * nested[block / nested_size] + offset, in two roundings (never one fused
// multiply-add: build with -ffp-contract=off), as in bitsandbytes.
//
// A weight is a stack and the index of a layer, so that no slice is copied.

#include "handler.h"
#include "integers.h"
#include "product.h"

namespace ffi = xla::ffi;

namespace qlora {
namespace {

// One layer of a stack of weights [N, K].
struct Weight {
  int64_t n, k, blocks, block_size;
  uint32_t nested_size;
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
    const uint32_t nested_at = static_cast<uint32_t>(at) / nested_size;  // less slow than a division of 64 bits
    const float product = map[absmax_codes[at]] * nested[nested_at];
    return product + offset;
  }

  // Writes the constants of all blocks of rows [first, last).
  void constants(int64_t first, int64_t last, float* to) const {
    const int64_t start = first * blocks, end = last * blocks;
    if (absmax != nullptr) {
      std::memcpy(to, absmax + start, (end - start) * sizeof(float));
      return;
    }
#if defined(__AVX512F__)
    const LargeTable numbers(map);
#endif
    for (int64_t at = start; at < end;) {
      const int64_t nested_at = at / nested_size, stop = std::min(end, (nested_at + 1) * nested_size);
      const float factor = nested[nested_at];
#if defined(__AVX512F__)
      for (; at + kLanes <= stop; at += kLanes)
        store(numbers[load_bytes(absmax_codes + at)] * factor + offset, to + at - start);
#endif
      for (; at < stop; ++at) {
        const float product = map[absmax_codes[at]] * factor;
        to[at - start] = product + offset;
      }
    }
  }
};

constexpr int64_t kWeightsPerPart = 65536;  // some microseconds

// Calls rows(first, last) in parallel for ranges of the N / 2 pairs of rows.
template <typename Rows>
void over_row_pairs(ffi::ThreadPool& pool, const Weight& w, int64_t weights_per_part, const Rows& rows) {
  const int64_t pairs = w.n / 2;
  const int64_t grain = std::max<int64_t>(1, weights_per_part / 2 / w.k);
  const int64_t parts = (pairs + grain - 1) / grain;
  in_parallel(pool, parts, [&](int64_t part) { rows(part * grain, std::min(pairs, (part + 1) * grain)); });
}

template <typename Out>
void dequantize_pairs(const Weight& w, Out* out, int64_t first, int64_t last) {
  const Table table(w.table);
  for (int64_t i = first; i < last; ++i) {
    const uint8_t* from = w.codes + i * w.k;
    Out* high = out + i * w.k;
    Out* low = out + (i + w.n / 2) * w.k;
    for (int64_t block = 0; block < w.blocks; ++block) {
      const float scale_high = w.constant(i, block), scale_low = w.constant(i + w.n / 2, block);
      for (int64_t k = block * w.block_size; k < (block + 1) * w.block_size; k += 2 * kLanes) {
        const Integers a = load_bytes(from + k), b = load_bytes(from + k + kLanes);
        store(table[a >> 4] * scale_high, table[b >> 4] * scale_high, high + k);
        store(table[a] * scale_low, table[b] * scale_low, low + k);
      }
    }
  }
}

// A pair of rows of the weight, whose codes share bytes.
struct Pair {
  const uint8_t* codes;
  const float *high, *low;  // constants of blocks

  Pair after(const Weight& w, int64_t pairs) const {
    return {codes + pairs * w.k, high + pairs * w.blocks, low + pairs * w.blocks};
  }
};

// Rows of x in f32, the most that are multiplied together, so that their sums within a block fit the registers.
struct Wide {
  static constexpr int kMostRows = kLanes == 16 ? 8 : 4;
  const Buffer<float> numbers;
  const NibbleTable table;
};

// Sets sums [half, row] of products of M rows of x, from `row`, with a pair of rows. Each sum is in the order of k for
// all M: of products with numbers of the table within a block, and of these times the constants.
template <int M>
__attribute__((always_inline)) inline void multiply_pair(const Weight& w, const Wide& x_MK, int64_t row,
                                                         const Pair& pair, Floats (&sums)[2][M]) {
  constexpr int kVectors = NibbleTable::kVectors;
  const float* x = x_MK.numbers.get() + row * w.k;
  const NibbleTable table = x_MK.table;
  Floats of_high[M] = {}, of_low[M] = {};
  for (int64_t block = 0; block < w.blocks; ++block) {
    Floats high_of_block[M] = {}, low_of_block[M] = {};
    for (int64_t k = block * w.block_size; k < (block + 1) * w.block_size; k += kVectors * kLanes) {
      if (k % kGroup == 0) __builtin_prefetch(pair.codes + k + kBytesAhead);
      const auto codes = NibbleTable::codes(pair.codes + k);
      Floats high[kVectors], low[kVectors];
      table.high(codes, high);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int i = 0; i < kVectors; ++i)
          high_of_block[m] = multiply_add(high[i], load(x + m * w.k + k + i * kLanes), high_of_block[m]);
      table.low(codes, low);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int i = 0; i < kVectors; ++i)
          low_of_block[m] = multiply_add(low[i], load(x + m * w.k + k + i * kLanes), low_of_block[m]);
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      of_high[m] = multiply_add(high_of_block[m], all(pair.high[block]), of_high[m]);
      of_low[m] = multiply_add(low_of_block[m], all(pair.low[block]), of_low[m]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) sums[0][m] = of_high[m], sums[1][m] = of_low[m];
}

#if defined(__AVX512BF16__)
// Rows of x in bf16, as vectors [K / 32, M, 32], so that a loop over k reads one stream.
struct Bfloat16 {
  static constexpr int kMostRows = 8;
  static constexpr int64_t kNumbers = 2 * kLanes;  // per vector
  int64_t m;
  Buffer<uint16_t> numbers;

  Bfloat16(const uint16_t* x, int64_t rows, int64_t k) : m(rows), numbers(rows * k) {
    for (int64_t row = 0; row < m; ++row)
      for (int64_t i = 0; i < k; i += kNumbers)
        std::memcpy(numbers.get() + i * m + row * kNumbers, x + row * k + i, kNumbers * sizeof(uint16_t));
  }
};

// The same with weights that are rounded to bf16, as training multiplies them: the 32 numbers that codes of a block of
// both rows stand for are one vector, and look-ups read five bits of an index.
template <int M>
__attribute__((always_inline)) inline void multiply_pair(const Weight& w, const Bfloat16& x_KM, int64_t row,
                                                         const Pair& pair, Floats (&sums)[2][M]) {
  constexpr int64_t kNumbers = Bfloat16::kNumbers;
  const uint16_t* x = x_KM.numbers.get() + row * kNumbers;
  const uint8_t* from = pair.codes;
  const int64_t vectors = w.block_size / kNumbers, step = x_KM.m * kNumbers;
  const Floats table = load(w.table);
  const __m512i second_half = _mm512_set1_epi16(16);
  const auto numbers_of = [&](int64_t block) {
    const Floats high = table * pair.high[block], low = table * pair.low[block];
    return (__m512i)_mm512_cvtne2ps_pbh((__m512)low, (__m512)high);
  };
  Floats of_high[M] = {}, of_low[M] = {};
  __m512i next = numbers_of(0);  // made before the products of the block before, which would delay it
  for (int64_t block = 0; block < w.blocks; ++block) {
    const __m512i numbers = next;
    next = numbers_of(std::min(block + 1, w.blocks - 1));
#pragma GCC unroll 2
    for (int64_t vector = 0; vector < vectors; ++vector, x += step, from += kNumbers) {
      __builtin_prefetch(from + kBytesAhead);
      const __m512i codes = _mm512_cvtepu8_epi16(load<__m256i>(from));
      const Integers high = (Integers)_mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 4), numbers);
      const Integers low = (Integers)_mm512_permutexvar_epi16(codes | second_half, numbers);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        const Integers x_m = load<Integers>(x + m * kNumbers);
        of_high[m] = Pairs::add_product(high, x_m, of_high[m]);
        of_low[m] = Pairs::add_product(low, x_m, of_low[m]);
      }
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) sums[0][m] = of_high[m], sums[1][m] = of_low[m];
}
#endif

// Rows of x and the numbers of the table, as integers with scales.
struct Coded {
  static constexpr int kMostRows = 4;
  CodedRows rows;
  int8_t table[16];
  float table_scale;

  Coded(const float* x, int64_t m, int64_t k, const float* numbers) : rows(x, m, k) {
    float greatest = 0;
    for (int i = 0; i < 16; ++i) greatest = std::max(greatest, std::abs(numbers[i]));
    for (int i = 0; i < 16; ++i) table[i] = static_cast<int8_t>(std::lround(numbers[i] / greatest * 127) + kZero);
    table_scale = greatest / 127;
  }
};

// The same with integers.
template <int M>
__attribute__((always_inline)) inline void multiply_pair(const Weight& w, const Coded& coded, int64_t row,
                                                         const Pair& pair, Floats (&sums)[2][M]) {
  const CodedRows& x = coded.rows;
  const ByteTable table(coded.table);
  const int64_t groups = w.k / kGroup, per_block = w.block_size / kGroup;
  Floats of_high[M] = {}, of_low[M] = {};
  for (int64_t block = 0; block < w.blocks; ++block)
    for (int64_t group = block * per_block; group < (block + 1) * per_block; ++group) {
      const uint8_t* from = pair.codes + group * kGroup;
      __builtin_prefetch(from + kBytesAhead);
      Integers high_of_group[M], low_of_group[M];
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m)
        high_of_group[m] = low_of_group[m] = load<Integers>(x.starts.get() + ((row + m) * groups + group) * kLanes);
#pragma GCC unroll 4
      for (int64_t i = 0; i < kGroup; i += kCodes) {
        const PackedCodes packed = load<PackedCodes>(from + i);
        const Codes high = table[packed >> 4], low = table[packed & 15];
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) {
          const Codes x_m = load<Codes>(x.codes.get() + (row + m) * w.k + group * kGroup + i);
          high_of_group[m] = add_products(high, x_m, high_of_group[m]);
          low_of_group[m] = add_products(low, x_m, low_of_group[m]);
        }
      }
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) {
        const Floats scale = all(x.scales.get()[(row + m) * groups + group]);
        of_high[m] = multiply_add(converted(high_of_group[m]) * scale, all(pair.high[block]), of_high[m]);
        of_low[m] = multiply_add(converted(low_of_group[m]) * scale, all(pair.low[block]), of_low[m]);
      }
    }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) sums[0][m] = of_high[m] * coded.table_scale, sums[1][m] = of_low[m] * coded.table_scale;
}

// Computes y of all m rows of x from `row` on, M at a time and then fewer, and P pairs of rows from `first` on. One pair
// follows another, so that codes are read in the order of memory, and the totals of all are made together.
template <int M, int P, typename X, typename Out>
void multiply_rows(const Weight& w, const X& x, int64_t row, int64_t m, Out* y, int64_t first, const Pair& pair) {
  for (; row + M <= m; row += M) {
    Floats sums[P][2][M];
    for (int p = 0; p < P; ++p) multiply_pair<M>(w, x, row, pair.after(w, p), sums[p]);
    float totals[(2 * M * P + kLanes - 1) / kLanes * kLanes] = {};
    Out rounded[std::size(totals)];
    totals_of<2 * M * P>(&sums[0][0][0], totals);
    for (size_t i = 0; i < std::size(totals); i += kLanes) store(load(totals + i), rounded + i);
    for (int p = 0; p < P; ++p)
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half)
#pragma GCC unroll 8
        for (int i = 0; i < M; ++i)
          y[(row + i) * w.n + first + p + half * (w.n / 2)] = rounded[(2 * p + half) * M + i];
  }
  if constexpr (M > 1)
    if (row < m) multiply_rows<M - 1, P>(w, x, row, m, y, first, pair);
}

// The same for pairs of rows [first, last).
template <typename X, typename Out>
void multiply(const Weight& w, int64_t m, const X& x, Out* y, int64_t first, int64_t last) {
  constexpr int kPairs = 4;
  const int64_t count = (last - first) * w.blocks;
  Buffer<float> constants(2 * count);
  w.constants(first, last, constants.get());
  w.constants(first + w.n / 2, last + w.n / 2, constants.get() + count);
  const Pair start{w.codes + first * w.k, constants.get(), constants.get() + count};
  int64_t done = 0;
  if (m <= 2)
    for (; first + done + kPairs <= last; done += kPairs)
      multiply_rows<2, kPairs>(w, x, 0, m, y, first + done, start.after(w, done));
  for (; first + done < last; ++done)
    multiply_rows<X::kMostRows, 1>(w, x, 0, m, y, first + done, start.after(w, done));
}

// ---- many rows

// The weights of a row or of two neighbouring ones, as terms.
template <typename Element>
struct Decoder {
  using T = Terms<Element>;
  using Word = typename T::Word;
  const Weight& w;
  Table table;

  explicit Decoder(const Weight& weight) : w(weight), table(weight.table) {}

  Floats at(int64_t n, int64_t k, float constant) const {
    const bool high = n < w.n / 2;
    const Integers codes = load_bytes(w.codes + (high ? n : n - w.n / 2) * w.k + k);
    return table[high ? codes >> 4 : codes] * constant;
  }
  // Stores weights [start, start + count) of row n.
  void row(int64_t n, int64_t start, int64_t count, typename T::Number* to) const {
    for (int64_t k = start; k < start + count;) {
      const int64_t end = std::min(start + count, (k / w.block_size + 1) * w.block_size);
      const float constant = w.constant(n, k / w.block_size);
      for (; k < end; k += kLanes) T::store(at(n, k, constant), to + k - start);
    }
  }
};

// Columns are rows of the weight, terms are along them.
template <typename Element>
struct Rows : Decoder<Element> {
  using Decoder<Element>::Decoder;
  using T = Terms<Element>;
  using Word = typename T::Word;

  void pack(int64_t panel, int64_t start, int64_t count, Word* to) const {
    Buffer<Word> rows(kSquare * count);
    for (int64_t column = 0; column < kColumns; column += kSquare) {
      for (int64_t i = 0; i < kSquare; ++i) {
        const int64_t n = std::min(panel * kColumns + column + i, this->w.n - 1);  // columns past the last are dropped
        auto* row = reinterpret_cast<typename T::Number*>(rows.get() + i * count);
        this->row(n, start * T::kNumbers, count * T::kNumbers, row);
      }
      pack_transposed(rows.get(), count, kSquare, count, to + column, kColumns);
    }
  }
};

// Columns are columns of the weight, terms are its rows.
template <typename Element>
struct Columns : Decoder<Element> {
  using Decoder<Element>::Decoder;
  using T = Terms<Element>;
  using Word = typename T::Word;

  void pack(int64_t panel, int64_t start, int64_t count, Word* to) const {
    const int64_t first = panel * kColumns;
    for (int64_t p = 0; p < count; ++p)
      for (int64_t k = first; k < std::min(first + kColumns, this->w.k); k += kLanes) {
        const auto words = terms(T::kNumbers * (start + p), k);
        std::memcpy(to + p * kColumns + k - first, &words, sizeof words);
      }
  }

  typename T::Words terms(int64_t n, int64_t k) const {
    const int64_t block = k / this->w.block_size;
    const Floats first = this->at(n, k, this->w.constant(n, block));
    if constexpr (T::kNumbers == 1) {
      return T::rounded(first);
    } else {
      return rounded(first) | rounded(this->at(n + 1, k, this->w.constant(n + 1, block))) << 16;
    }
  }
};

// ---- handlers

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
  w.nested_size = static_cast<uint32_t>(nested_size);
  if (w.block_size % 32 != 0 || w.block_size * w.blocks != w.k)
    return ffi::Unexpected(ffi::Error::InvalidArgument("blocks must be whole and of a multiple of 32 weights"));
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
                      ffi::Buffer<ffi::F32> table, ffi::Buffer<ffi::F32> map, int64_t nested_size,
                      ffi::Result<ffi::AnyBuffer> out) {
  const auto found = weight_of(codes, scales, nested, offset, layer, table, map, nested_size);
  if (found.has_error()) return found.error();
  const Weight& w = found.value();
  over_row_pairs(pool, w, kWeightsPerPart, [&](int64_t first, int64_t last) {
    if (out->element_type() == ffi::F32)
      dequantize_pairs(w, reinterpret_cast<float*>(out->untyped_data()), first, last);
    else
      dequantize_pairs(w, reinterpret_cast<uint16_t*>(out->untyped_data()), first, last);
  });
  return ffi::Error::Success();
}

ffi::Error rows(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Buffer<ffi::U8> codes, ffi::AnyBuffer scales,
                ffi::Buffer<ffi::F32> nested, ffi::Buffer<ffi::F32> offset, ffi::Buffer<ffi::S32> layer,
                ffi::Buffer<ffi::F32> table, ffi::Buffer<ffi::F32> map, int64_t nested_size,
                ffi::Result<ffi::AnyBuffer> y, bool integer) {
  const auto found = weight_of(codes, scales, nested, offset, layer, table, map, nested_size);
  if (found.has_error()) return found.error();
  const Weight& w = found.value();
  if (integer && w.block_size % kGroup != 0)
    return ffi::Error::InvalidArgument("products of integers need blocks of a multiple of 64 weights");
  const int64_t m = x.dimensions()[0];
  const int64_t weights_per_part = m <= 2 ? 2 * kWeightsPerPart : kWeightsPerPart;  // longer streams are read faster
  const auto run = [&](const auto& rows) {
    over_row_pairs(pool, w, weights_per_part, [&](int64_t first, int64_t last) {
      if (y->element_type() == ffi::F32)
        multiply(w, m, rows, reinterpret_cast<float*>(y->untyped_data()), first, last);
      else
        multiply(w, m, rows, reinterpret_cast<uint16_t*>(y->untyped_data()), first, last);
    });
  };
  if (integer) {
    run(Coded(in_f32(x).get(), m, w.k, w.table));
#if defined(__AVX512BF16__)
  } else if (x.element_type() == ffi::BF16) {
    run(Bfloat16(reinterpret_cast<const uint16_t*>(x.untyped_data()), m, w.k));
#endif
  } else {
    run(Wide{in_f32(x), NibbleTable(w.table)});
  }
  return ffi::Error::Success();
}

// x [M, K], or [M, N] if transposed; strips: memory of as many words as x has terms, both sizes rounded up for AMX.
ffi::Error product(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Buffer<ffi::U8> codes, ffi::AnyBuffer scales,
                   ffi::Buffer<ffi::F32> nested, ffi::Buffer<ffi::F32> offset, ffi::Buffer<ffi::S32> layer,
                   ffi::Buffer<ffi::F32> table, ffi::Buffer<ffi::F32> map, int64_t nested_size,
                   ffi::Result<ffi::AnyBuffer> y, ffi::Result<ffi::Buffer<ffi::U32>> strips, bool transposed) {
  const auto found = weight_of(codes, scales, nested, offset, layer, table, map, nested_size);
  if (found.has_error()) return found.error();
  const Weight& w = found.value();
  const int64_t m = x.dimensions()[0], terms = transposed ? w.n : w.k, columns = transposed ? w.k : w.n;
  const auto run = [&](auto example, auto source) {
    using Element = decltype(example);
    using Made = Product<Element, decltype(source)>;
    const Made made{m, columns, terms, reinterpret_cast<const Element*>(x.untyped_data()), source,
                    reinterpret_cast<Element*>(y->untyped_data()),
                    reinterpret_cast<typename Made::Word*>(strips->typed_data())};
    if (static_cast<int64_t>(strips->element_count()) < made.words())
      return ffi::Error::InvalidArgument("there is not enough room for the packed rows");
    made.run(pool);
    return ffi::Error::Success();
  };
  const bool f32 = x.element_type() == ffi::F32;
  if (transposed) return f32 ? run(float(), Columns<float>(w)) : run(uint16_t(), Columns<uint16_t>(w));
  return f32 ? run(float(), Rows<float>(w)) : run(uint16_t(), Rows<uint16_t>(w));
}

}  // namespace
}  // namespace qlora

#define NF4_WEIGHT_ARGUMENTS      \
  Arg<ffi::Buffer<ffi::U8>>()     \
      .Arg<ffi::AnyBuffer>()      \
      .Arg<ffi::Buffer<ffi::F32>>() \
      .Arg<ffi::Buffer<ffi::F32>>() \
      .Arg<ffi::Buffer<ffi::S32>>() \
      .Arg<ffi::Buffer<ffi::F32>>() \
      .Arg<ffi::Buffer<ffi::F32>>() \
      .Attr<int64_t>("nested_size") \
      .Ret<ffi::AnyBuffer>()

QLORA_HANDLER(nf4_dequantize, qlora::dequantize, ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().NF4_WEIGHT_ARGUMENTS);
QLORA_HANDLER(
    nf4_rows, qlora::rows,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::AnyBuffer>().NF4_WEIGHT_ARGUMENTS.Attr<bool>("integer"));
QLORA_HANDLER(nf4_product, qlora::product,
              ffi::Ffi::Bind()
                  .Ctx<ffi::ThreadPool>()
                  .Arg<ffi::AnyBuffer>()
                  .NF4_WEIGHT_ARGUMENTS.Ret<ffi::Buffer<ffi::U32>>()
                  .Attr<bool>("transposed"));
