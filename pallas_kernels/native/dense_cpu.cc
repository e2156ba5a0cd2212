// Products of matrices: two XLA FFI handlers.
//
//   product_f32:  c[m, n] = sum_k a[m, k] b[k, n], or b[n, k] if transposed; in f32, for many rows
//   dense_rows:   y[m, n] = sum_k x[m, k] w[n, k], or w[k, n] unless transposed; of f32 or bf16 numbers, summed in f32,
//                 for few rows. w is read from memory once and never packed, because reading it takes all the time

#include "product.h"

namespace ffi = xla::ffi;

namespace qlora {
namespace {

struct Dense {
  const float* b;
  int64_t n, k;
  bool transposed;

  void pack(int64_t panel, int64_t start, int64_t count, float* to) const {
    const int64_t first = panel * kColumns, columns = std::min(kColumns, n - first);
    if (columns < kColumns) std::memset(to, 0, count * kColumns * sizeof(float));
    if (transposed) return pack_transposed(b + first * k + start, k, columns, count, to, kColumns);
    for (int64_t p = 0; p < count; ++p)
      std::memcpy(to + p * kColumns, b + (start + p) * n + first, columns * sizeof(float));
  }
};

// c [m, n]; strips: memory of as many numbers as a has.
ffi::Error product(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> a, ffi::Buffer<ffi::F32> b,
                   ffi::Result<ffi::Buffer<ffi::F32>> c, ffi::Result<ffi::Buffer<ffi::F32>> strips, bool transposed) {
  const int64_t m = a.dimensions()[0], k = a.dimensions()[1], n = c->dimensions()[1];
  if (strips->element_count() < a.element_count())
    return ffi::Error::InvalidArgument("there is not enough room for the packed operand");
  const Dense source{b.typed_data(), n, k, transposed};
  Product<float, Dense>{m, n, k, a.typed_data(), source, c->typed_data(), strips->typed_data()}.run(pool);
  return ffi::Error::Success();
}

// ---- few rows

constexpr int kMostRows = 8;  // of x that are multiplied together, so that their sums fit the registers

// X: numbers of x, which are f32 or those of w.
template <typename X, typename Element, typename Out>
struct FewRows {
  static constexpr bool kSame = std::is_same_v<X, Element>;
  using T = std::conditional_t<kSame, Terms<Element>, Singles<Element>>;
  static constexpr int64_t kNumbers = T::kNumbers * kLanes;  // per vector
  int64_t n, k;
  const X* x;
  const Element* w;
  Out* y;

  template <typename From>
  static typename T::Words words(const From* at) {
    if constexpr (T::kNumbers == 2)
      return load<typename T::Words>(at);
    else
      return load(at);
  }
  // Computes y of M rows of x, from `row`, and P rows of w, from `first`. Each sum is in the order of k. One row of w
  // follows another, so that they are read in the order of memory, and the totals of all are made together.
  template <int M, int P>
  void block(int64_t row, int64_t first) const {
    Floats sums[P][M];
    const int64_t whole = k / kNumbers * kNumbers;
    for (int p = 0; p < P; ++p) {
      const Element* at = w + (first + p) * k;
      Floats of_row[M] = {};
      for (int64_t i = 0; i < whole; i += kNumbers) {
        if (i % (64 / sizeof(Element)) == 0) __builtin_prefetch(reinterpret_cast<const char*>(at + i) + kBytesAhead);
        const typename T::Words weights = words(at + i);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) of_row[m] = T::add_product(weights, words(x + (row + m) * k + i), of_row[m]);
      }
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) sums[p][m] = of_row[m];
    }
    float totals[P][M];
    totals_of<P * M>(&sums[0][0], &totals[0][0]);
    for (int p = 0; p < P; ++p)
      for (int m = 0; m < M; ++m) {
        float total = totals[p][m];
        for (int64_t i = whole; i < k; ++i) total += number(w[(first + p) * k + i]) * number(x[(row + m) * k + i]);
        put(total, y + (row + m) * n + first + p);
      }
  }
  // Computes y of all rows of x from `row` on, M rows at a time and then fewer, and P rows of w.
  template <int M, int P>
  void rows(int64_t row, int64_t m, int64_t first) const {
    for (; row + M <= m; row += M) block<M, P>(row, first);
    if constexpr (M > 1)
      if (row < m) rows<M - 1, P>(row, m, first);
  }
  void run(ffi::ThreadPool& pool, int64_t m) const {
    constexpr int kNeighbours = 8;
    const int64_t grain = (65536 / k + kNeighbours) / kNeighbours * kNeighbours;  // some microseconds
    in_parallel(pool, (n + grain - 1) / grain, [&](int64_t part) {
      const int64_t last = std::min(n, (part + 1) * grain);
      int64_t first = part * grain;
      if (m <= 2)
        for (; first + kNeighbours <= last; first += kNeighbours) rows<2, kNeighbours>(0, m, first);
      for (; first < last; ++first) rows<kMostRows, 1>(0, m, first);
    });
  }
};

constexpr int kMostSums = kLanes == 16 ? 4 : 2;  // rows of x whose sums with four vectors fit the registers

// The same for w [k, n]: vectors are along columns, and each column's terms are added in order.
template <typename Element, typename Out>
struct FewRowsOfColumns {
  int64_t n, k;
  const float* x;
  const Element* w;
  Out* y;

  // Computes y of M rows of x and V vectors of columns, whose terms p are at[p * stride]; `count` columns are written.
  template <int M, int V>
  void block(int64_t row, int64_t first, const Element* at, int64_t stride, int64_t count) const {
    Floats sums[M][V] = {};
    for (int64_t p = 0; p < k; ++p) {
      Floats columns[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) columns[v] = load(at + p * stride + v * kLanes);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) {
        const Floats x_m = all(x[(row + m) * k + p]);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sums[m][v] = multiply_add(x_m, columns[v], sums[m][v]);
      }
    }
    for (int m = 0; m < M; ++m) {
      float totals[V * kLanes];
      std::memcpy(totals, sums[m], sizeof totals);
      for (int64_t i = 0; i < count; ++i) put(totals[i], y + (row + m) * n + first + i);
    }
  }
  template <int M, int V>
  void rows(int64_t row, int64_t m, int64_t first, const Element* at, int64_t stride, int64_t count) const {
    for (; row + M <= m; row += M) block<M, V>(row, first, at, stride, count);
    if constexpr (M > 1)
      if (row < m) rows<M - 1, V>(row, m, first, at, stride, count);
  }
  void run(ffi::ThreadPool& pool, int64_t m) const {
    constexpr int kMost = 4;  // vectors of columns per part
    in_parallel(pool, (n + kMost * kLanes - 1) / (kMost * kLanes), [&](int64_t part) {
      int64_t first = part * kMost * kLanes;
      const int64_t last = std::min(n, first + kMost * kLanes);
      if (last - first == kMost * kLanes) return rows<kMostSums, kMost>(0, m, first, w + first, n, last - first);
      for (; first + kLanes <= last; first += kLanes) rows<4, 1>(0, m, first, w + first, n, kLanes);
      if (first == last) return;
      Buffer<Element> padded(k * kLanes);
      std::memset(padded.get(), 0, k * kLanes * sizeof(Element));
      for (int64_t p = 0; p < k; ++p)
        std::memcpy(padded.get() + p * kLanes, w + p * n + first, (last - first) * sizeof(Element));
      rows<4, 1>(0, m, first, padded.get(), kLanes, last - first);
    });
  }
};

// Calls work(Element()) with the type of a buffer's numbers: float, or uint16_t for bf16.
template <typename Work>
void with_numbers(const ffi::DataType type, const Work& work) {
  if (type == ffi::F32)
    work(float());
  else
    work(uint16_t());
}

// x [m, k], w [n, k] or [k, n], y [m, n]: each f32 or bf16.
ffi::Error few_rows(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer w, ffi::Result<ffi::AnyBuffer> y,
                    bool transposed) {
  const int64_t m = x.dimensions()[0], k = x.dimensions()[1], n = y->dimensions()[1];
  with_numbers(w.element_type(), [&](auto element) {
    with_numbers(y->element_type(), [&](auto out) {
      using Element = decltype(element);
      using Out = decltype(out);
      const auto* from = reinterpret_cast<const Element*>(w.untyped_data());
      auto* to = reinterpret_cast<Out*>(y->untyped_data());
      if (transposed && Terms<Element>::kNumbers == 2 && x.element_type() == w.element_type())
        return FewRows<Element, Element, Out>{n, k, reinterpret_cast<const Element*>(x.untyped_data()), from, to}.run(
            pool, m);
      const Buffer<float> x_MK = in_f32(x);
      if (transposed)
        FewRows<float, Element, Out>{n, k, x_MK.get(), from, to}.run(pool, m);
      else
        FewRowsOfColumns<Element, Out>{n, k, x_MK.get(), from, to}.run(pool, m);
    });
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace qlora

QLORA_HANDLER(product_f32, qlora::product,
              ffi::Ffi::Bind()
                  .Ctx<ffi::ThreadPool>()
                  .Arg<ffi::Buffer<ffi::F32>>()
                  .Arg<ffi::Buffer<ffi::F32>>()
                  .Ret<ffi::Buffer<ffi::F32>>()
                  .Ret<ffi::Buffer<ffi::F32>>()
                  .Attr<bool>("transposed"));
QLORA_HANDLER(dense_rows, qlora::few_rows,
              ffi::Ffi::Bind()
                  .Ctx<ffi::ThreadPool>()
                  .Arg<ffi::AnyBuffer>()
                  .Arg<ffi::AnyBuffer>()
                  .Ret<ffi::AnyBuffer>()
                  .Attr<bool>("transposed"));
