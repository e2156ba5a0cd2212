// Product of f32 matrices on CPUs with AVX-512, or AVX2 and FMA: one XLA FFI handler.
//
//   product_f32:  c[m, n] = sum_k a[m, k] b[k, n], or b[n, k] if transposed
//
// Both operands are packed, so that the inner loop reads each as one stream: b once, in panels of kColumns columns; a
// in strips of kRows rows, by the part that multiplies them. A tile of c, kRows x kColumns sums, stays in registers for
// a chunk of k. A part's strips and one panel's chunk fit a core's L2 cache.
//
// Sums are in the order of k, in chunks whose length depends only on k. So a row's result depends neither on other rows
// nor on the number of threads.

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "buffer.h"
#include "parallel.h"

namespace ffi = xla::ffi;
using qlora::Buffer;

namespace {

#if defined(__AVX512F__)
using Vector = __m512;
constexpr int kRows = 12;
inline Vector load(const float* at) { return _mm512_loadu_ps(at); }
inline void store(Vector x, float* to) { _mm512_storeu_ps(to, x); }
inline Vector all(float x) { return _mm512_set1_ps(x); }
inline Vector multiply_add(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
#elif defined(__AVX2__) && defined(__FMA__)
using Vector = __m256;
constexpr int kRows = 6;
inline Vector load(const float* at) { return _mm256_loadu_ps(at); }
inline void store(Vector x, float* to) { _mm256_storeu_ps(to, x); }
inline Vector all(float x) { return _mm256_set1_ps(x); }
inline Vector multiply_add(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
#else
#error "this processor has neither AVX-512 nor AVX2 with FMA"
#endif

constexpr int64_t kWidth = sizeof(Vector) / sizeof(float);
constexpr int64_t kColumns = 2 * kWidth;
constexpr int64_t kMostRows = 4 * kRows;  // rows per part: with a chunk of a panel they take a third of a megabyte
constexpr int64_t kMostTerms = 1024;      // terms per chunk of k
constexpr int64_t kAhead = 16;            // steps of k that the inner loop prefetches
constexpr int64_t kSquare = 8;            // size of a transposition in registers

// ---- packing

// to[j * to_stride + i] = from[i * from_stride + j] for i, j below 8.
inline void transpose(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  __m256 x[kSquare], y[kSquare];
  for (int64_t i = 0; i < kSquare; ++i) x[i] = _mm256_loadu_ps(from + i * from_stride);
  for (int64_t i = 0; i < kSquare; i += 2) {
    y[i] = _mm256_unpacklo_ps(x[i], x[i + 1]);
    y[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
  }
  for (int64_t i = 0; i < kSquare; i += 4) {
    x[i] = _mm256_shuffle_ps(y[i], y[i + 2], 0x44);
    x[i + 1] = _mm256_shuffle_ps(y[i], y[i + 2], 0xee);
    x[i + 2] = _mm256_shuffle_ps(y[i + 1], y[i + 3], 0x44);
    x[i + 3] = _mm256_shuffle_ps(y[i + 1], y[i + 3], 0xee);
  }
  for (int64_t j = 0; j < 4; ++j) {
    _mm256_storeu_ps(to + j * to_stride, _mm256_permute2f128_ps(x[j], x[j + 4], 0x20));
    _mm256_storeu_ps(to + (j + 4) * to_stride, _mm256_permute2f128_ps(x[j], x[j + 4], 0x31));
  }
}

// to[k * width + r] = from[r * stride + k] for r below rows and k below terms; width >= rows.
void pack_transposed(const float* from, int64_t stride, int64_t rows, int64_t terms, float* to, int64_t width) {
  const int64_t squares = rows < kSquare ? 0 : terms / kSquare * kSquare;
  for (int64_t k = 0; k < squares; k += kSquare)
    for (int64_t r = 0; r < rows; r += kSquare) {  // the last square may repeat rows of the previous one
      const int64_t first = std::min(r, rows - kSquare);
      transpose(from + first * stride + k, stride, to + k * width + first, width);
    }
  for (int64_t k = squares; k < terms; ++k)
    for (int64_t r = 0; r < rows; ++r) to[k * width + r] = from[r * stride + k];
}

// to[k * kColumns + j] = from[k * stride + j] for j below columns and k below terms.
void pack_straight(const float* from, int64_t stride, int64_t columns, int64_t terms, float* to) {
  for (int64_t k = 0; k < terms; ++k) std::memcpy(to + k * kColumns, from + k * stride, columns * sizeof(float));
}

// ---- tiles

// c[rows, kColumns] (+)= a[terms, rows]^T b[terms, kColumns], rows at most R.
template <int R>
void tile(int64_t rows, const float* a, const float* b, int64_t terms, bool add, float* c, int64_t c_stride) {
  if constexpr (R > 1)
    if (rows < R) return tile<R - 1>(rows, a, b, terms, add, c, c_stride);
  Vector sums[R][2];
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < 2; ++j) {
      float* at = c + r * c_stride + j * kWidth;
      _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T0);
      sums[r][j] = add ? load(at) : all(0.0f);
    }
  for (int64_t k = 0; k < terms; ++k) {
    const float* ahead = b + (k + kAhead) * kColumns;  // may be out of bounds: prefetching never faults
    _mm_prefetch(reinterpret_cast<const char*>(ahead), _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(ahead + kWidth), _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(a + (k + kAhead) * R), _MM_HINT_T0);
    const Vector left = load(b + k * kColumns), right = load(b + k * kColumns + kWidth);
    for (int r = 0; r < R; ++r) {
      const Vector x = all(a[k * R + r]);
      sums[r][0] = multiply_add(x, left, sums[r][0]);
      sums[r][1] = multiply_add(x, right, sums[r][1]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < 2; ++j) store(sums[r][j], c + r * c_stride + j * kWidth);
}

// The same if c has fewer columns than a tile.
void narrow_tile(int64_t rows, const float* a, const float* b, int64_t terms, bool add, float* c, int64_t c_stride,
                 int64_t columns) {
  float whole[kRows * kColumns] = {};
  for (int64_t r = 0; add && r < rows; ++r)
    std::memcpy(whole + r * kColumns, c + r * c_stride, columns * sizeof(float));
  tile<kRows>(rows, a, b, terms, add, whole, kColumns);
  for (int64_t r = 0; r < rows; ++r)
    std::memcpy(c + r * c_stride, whole + r * kColumns, columns * sizeof(float));
}

// ---- the product

struct Product {
  int64_t m, n, k;
  const float *a, *b;
  bool transposed;
  float *c, *panels;  // b packed: [panels, k, kColumns]; columns past n are computed and dropped

  int64_t count() const { return (n + kColumns - 1) / kColumns; }
  int64_t blocks() const { return (m + kMostRows - 1) / kMostRows; }
  int64_t terms() const {
    const int64_t chunks = (k + kMostTerms - 1) / kMostTerms;
    return (k + chunks - 1) / chunks;
  }
  int64_t columns(int64_t panel) const { return std::min(kColumns, n - panel * kColumns); }

  void pack_panel(int64_t panel) const {
    float* to = panels + panel * k * kColumns;
    if (columns(panel) < kColumns) std::memset(to, 0, k * kColumns * sizeof(float));
    if (transposed)
      pack_transposed(b + panel * kColumns * k, k, columns(panel), k, to, kColumns);
    else
      pack_straight(b + panel * kColumns, n, columns(panel), k, to);
  }

  // Computes rows [first, last) of c in the columns of panels [begin, end).
  void part(int64_t first, int64_t last, int64_t begin, int64_t end) const {
    Buffer<float> strips(kMostRows * terms());
    for (int64_t start = 0; start < k; start += terms()) {
      const int64_t count = std::min(terms(), k - start);
      for (int64_t row = first; row < last; row += kRows) {
        const int64_t rows = std::min<int64_t>(kRows, last - row);
        pack_transposed(a + row * k + start, k, rows, count, strips.get() + (row - first) * count, rows);
      }
      for (int64_t panel = begin; panel < end; ++panel)
        for (int64_t row = first; row < last; row += kRows)
          multiply(row, std::min<int64_t>(kRows, last - row), panel, start, count,
                   strips.get() + (row - first) * count);
    }
  }

  void multiply(int64_t row, int64_t rows, int64_t panel, int64_t start, int64_t count, const float* strip) const {
    const float* packed = panels + (panel * k + start) * kColumns;
    float* to = c + row * n + panel * kColumns;
    if (columns(panel) == kColumns)
      tile<kRows>(rows, strip, packed, count, start > 0, to, n);
    else
      narrow_tile(rows, strip, packed, count, start > 0, to, n, columns(panel));
  }
};

// c [m, n]; panels [panels, k, columns per panel] is memory for packed b, which XLA allocates and counts.
ffi::Error product(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> a, ffi::Buffer<ffi::F32> b,
                   ffi::Result<ffi::Buffer<ffi::F32>> c, ffi::Result<ffi::Buffer<ffi::F32>> panels, bool transposed) {
  const int64_t m = a.dimensions()[0], k = a.dimensions()[1], n = c->dimensions()[1];
  const Product p{m, n, k, a.typed_data(), b.typed_data(), transposed, c->typed_data(), panels->typed_data()};
  if (static_cast<int64_t>(panels->element_count()) < p.count() * k * kColumns)
    return ffi::Error::InvalidArgument("there is not enough room for the packed operand");
  qlora::in_parallel(pool, p.count(), [&](int64_t panel) { p.pack_panel(panel); });
  const int64_t wanted = 4 * pool.num_threads();  // enough parts that no thread waits long for the last
  const int64_t groups = std::clamp<int64_t>(wanted / p.blocks(), 1, p.count());
  qlora::in_parallel(pool, p.blocks() * groups, [&](int64_t index) {
    const int64_t block = index / groups, group = index % groups;
    p.part(block * kMostRows, std::min(m, (block + 1) * kMostRows), group * p.count() / groups,
           (group + 1) * p.count() / groups);
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(product_f32, product,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<bool>("transposed"));
