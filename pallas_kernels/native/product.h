// Products of many rows, of f32 or bf16 numbers, with a right operand that is packed where it is used.
//
//   c[m, n] = sum_k a[m, k] b[k, n], summed in f32 and rounded once
//
// Both operands are packed, so that the inner loop reads each as one stream: `a` once, in strips of kRows rows, into
// memory that XLA allocates and counts; b in panels of kColumns columns, by the part that multiplies them. So a weight
// that is decoded while it is packed never exists as a whole. A tile of c, kRows x kColumns sums, stays in registers for
// a chunk of terms. A panel's chunk and a part's sums fit a core's L2 cache.
//
// Sums are in the order of k, in chunks whose length depends only on k. So a row's result depends neither on other rows
// nor on the number of threads.

#pragma once

#include "handler.h"
#include "terms.h"

namespace qlora {

constexpr int kVectors = kLanes == 4 ? 4 : 2;  // per row of a tile, whose sums take three quarters of the registers
constexpr int64_t kColumns = kVectors * kLanes;
constexpr int64_t kWhole = 16;  // chunks but the last have a multiple of as many terms
constexpr int64_t kAhead = 16;  // terms that the inner loop prefetches
constexpr int64_t kSquare = 8;  // size of a transposition in registers

// ---- packing

typedef float Eight __attribute__((vector_size(32)));
#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int32_t Places __attribute__((vector_size(32)));
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (Places){__VA_ARGS__})
#endif

// to[j * to_stride + i] = from[i * from_stride + j] for i, j below 8, of any words of 32 bits.
template <typename Word>
inline void transpose(const Word* from, int64_t from_stride, Word* to, int64_t to_stride) {
  Eight x[kSquare], y[kSquare];
  for (int64_t i = 0; i < kSquare; ++i) x[i] = load<Eight>(from + i * from_stride);
  for (int64_t i = 0; i < kSquare; i += 2) {
    y[i] = SHUFFLE(x[i], x[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    y[i + 1] = SHUFFLE(x[i], x[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
  for (int64_t i = 0; i < kSquare; i += 4)
    for (int64_t j = 0; j < 2; ++j) {
      x[i + 2 * j] = SHUFFLE(y[i + j], y[i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
      x[i + 2 * j + 1] = SHUFFLE(y[i + j], y[i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
  for (int64_t j = 0; j < 4; ++j) {
    y[j] = SHUFFLE(x[j], x[j + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    y[j + 4] = SHUFFLE(x[j], x[j + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
  for (int64_t j = 0; j < kSquare; ++j) std::memcpy(to + j * to_stride, &y[j], sizeof y[j]);
}

// to[k * width + r] = from[r * stride + k] for r below rows and k below terms; width >= rows.
template <typename Word>
void pack_transposed(const Word* from, int64_t stride, int64_t rows, int64_t terms, Word* to, int64_t width) {
  const int64_t squares = rows < kSquare ? 0 : terms / kSquare * kSquare;
  for (int64_t k = 0; k < squares; k += kSquare)
    for (int64_t r = 0; r < rows; r += kSquare) {  // the last square may repeat rows of the previous one
      const int64_t first = std::min(r, rows - kSquare);
      transpose(from + first * stride + k, stride, to + k * width + first, width);
    }
  for (int64_t k = squares; k < terms; ++k)
    for (int64_t r = 0; r < rows; ++r) to[k * width + r] = from[r * stride + k];
}

// ---- tiles

// c[R, kColumns] (+)= a[terms, R]^T b[terms, kColumns].
template <typename T, int R>
inline void tile(const typename T::Word* a, const typename T::Word* b, int64_t terms, bool add, float* c) {
  Floats sums[R][kVectors];
#pragma GCC unroll 16  // else GCC copies sums as one array, which is then in memory
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) sums[r][j] = add ? load(c + r * kColumns + j * kLanes) : Floats{};
  for (int64_t k = 0; k < terms; ++k) {
    const auto* b_k = b + k * kColumns;  // what is ahead may be out of bounds: prefetching never faults
    for (int64_t j = 0; j < kColumns; j += 16) __builtin_prefetch(b_k + kAhead * kColumns + j);
    __builtin_prefetch(a + (k + kAhead) * R);
    typename T::Words row[kVectors];
    for (int j = 0; j < kVectors; ++j) row[j] = load<typename T::Words>(b_k + j * kLanes);
    for (int r = 0; r < R; ++r) {
      const typename T::Words x = T::broadcast(a[k * R + r]);
      for (int j = 0; j < kVectors; ++j) sums[r][j] = T::add_product(x, row[j], sums[r][j]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) store(sums[r][j], c + r * kColumns + j * kLanes);
}

// The same for up to R rows.
template <typename T, int R>
void tile_of(int64_t rows, const typename T::Word* a, const typename T::Word* b, int64_t terms, bool add, float* c) {
  if constexpr (R > 1)
    if (rows < R) return tile_of<T, R - 1>(rows, a, b, terms, add, c);
  tile<T, R>(a, b, terms, add, c);
}

// ---- strips

// Strips of kRows rows: how they are packed, and multiplied with a panel. Panels have kColumns columns.
template <typename T>
struct Strips {
  using Word = typename T::Word;
  static constexpr int64_t kRows = kLanes == 16 ? 12 : 6;
  static constexpr int64_t kMostRows = 528;    // per part, whose strips stay in the processor's caches for many panels
  static constexpr int64_t kMostTerms = 1024;  // per chunk

  // Returns the size of all strips, and the place of a strip's terms from `start` on; `rows`: its rows.
  static int64_t words(int64_t rows, int64_t terms) { return rows * terms; }
  static int64_t place(int64_t row, int64_t rows, int64_t start, int64_t terms) { return row * terms + start * rows; }

  template <typename Element>
  static void pack(const Element* a, int64_t rows, int64_t terms, Word* to) {
    if constexpr (T::kInPlace) {
      pack_transposed(reinterpret_cast<const Word*>(a), terms, rows, terms, to, rows);
    } else {
      Buffer<Word> wide(rows * terms);
      for (int64_t i = 0; i < rows * terms; ++i) wide.get()[i] = T::word(a + i);
      pack_transposed(wide.get(), terms, rows, terms, to, rows);
    }
  }
  struct Registers {};  // that a thread has to prepare
  static void pad(Word*, int64_t) {}  // a panel's chunk may have any number of terms
  static void multiply(int64_t rows, const Word* a, const Word* b, int64_t terms, bool add, float* c) {
    tile_of<T, kRows>(rows, a, b, terms, add, c);
  }
};

}  // namespace qlora

#if defined(__AMX_BF16__)
#include "amx.h"
#endif

namespace qlora {

// ---- the product

// `Source` packs the right operand: pack(panel, start, count, to) writes terms [start, start + count) of the columns of a
// panel to to[count, kColumns]. Columns past n are computed and dropped.
template <typename Element, typename Source>
struct Product {
  using T = Terms<Element>;
  using Strips = qlora::Strips<T>;
  using Word = typename T::Word;
  static constexpr int64_t kRows = Strips::kRows;
  int64_t m, n, k;  // k: numbers
  const Element* a;
  const Source& source;
  Element* c;
  Word* strips;  // a packed, `words()` of them

  int64_t all_terms() const { return k / T::kNumbers; }
  int64_t words() const { return Strips::words(m, all_terms()); }
  int64_t panels() const { return (n + kColumns - 1) / kColumns; }
  int64_t chunk() const {  // terms per chunk: about equal ones, of whole vectors of codes
    const int64_t chunks = (all_terms() + Strips::kMostTerms - 1) / Strips::kMostTerms;
    const int64_t each = (all_terms() + chunks - 1) / chunks;
    return (each + kWhole - 1) / kWhole * kWhole;
  }

  void pack_strip(int64_t strip) const {
    const int64_t first = strip * kRows, rows = std::min<int64_t>(kRows, m - first);
    Strips::pack(a + first * k, rows, all_terms(), strips + Strips::place(first, rows, 0, all_terms()));
  }

  // Computes rows [first, last) of c in the columns of a panel.
  void part(int64_t first, int64_t last, int64_t panel) const {
    [[maybe_unused]] const typename Strips::Registers registers;
    Buffer<Word> packed(chunk() * kColumns);
    Buffer<float> sums((last - first + kRows - 1) / kRows * kRows * kColumns);
    for (int64_t start = 0; start < all_terms(); start += chunk()) {
      const int64_t count = std::min(chunk(), all_terms() - start);
      source.pack(panel, start, count, packed.get());
      Strips::pad(packed.get(), count);
      for (int64_t row = first; row < last; row += kRows) {
        const int64_t rows = std::min<int64_t>(kRows, last - row);
        const Word* strip = strips + Strips::place(row, rows, start, all_terms());
        Strips::multiply(rows, strip, packed.get(), count, start > 0, sums.get() + (row - first) * kColumns);
      }
    }
    for (int64_t row = first; row < last; ++row) write(sums.get() + (row - first) * kColumns, row, panel * kColumns);
  }

  void write(const float* sums, int64_t row, int64_t column) const {
    Element* to = c + row * n + column;
    if (column + kColumns <= n) {
      for (int64_t j = 0; j < kColumns; j += kLanes) store(load(sums + j), to + j);
    } else {
      for (int64_t j = 0; column + j < n; ++j) put(sums[j], to + j);
    }
  }

  void run(xla::ffi::ThreadPool& pool) const {
    in_parallel(pool, (m + kRows - 1) / kRows, [&](int64_t strip) { pack_strip(strip); });
    const int64_t for_threads = (2 * pool.num_threads() + panels() - 1) / panels();
    const int64_t blocks = std::max((m + Strips::kMostRows - 1) / Strips::kMostRows, for_threads);
    const int64_t each = ((m + blocks - 1) / blocks + kRows - 1) / kRows * kRows;  // rows per block
    in_parallel(pool, (m + each - 1) / each * panels(), [&](int64_t index) {
      const int64_t first = index / panels() * each;
      part(first, std::min(m, first + each), index % panels());
    });
  }
};

}  // namespace qlora
