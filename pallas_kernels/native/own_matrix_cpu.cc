// Products of rows that each have a matrix of their own, such as the adapters of several runs: one XLA FFI handler.
//
//   own_matrix:  y[m, n] = sum_k x[m, k] w[own[m] - 1, k, n], of f32 or bf16 numbers, summed in f32 in the order of k
//
// w is one layer of a stack, so no slice of it is copied. Rows with own[m] = 0 have no matrix, and get zeros.

#include "handler.h"

namespace ffi = xla::ffi;

namespace qlora {
namespace {

constexpr int64_t kVectors = 4;  // of columns, whose sums stay in registers
constexpr int64_t kColumns = kVectors * kLanes;

template <typename Element>
void columns(const float* x, const Element* w, int64_t k, int64_t n, int64_t first, float* y) {
  if (first + kColumns <= n) {
    Floats sums[kVectors] = {};
    for (int64_t i = 0; i < k; ++i)
      for (int64_t j = 0; j < kVectors; ++j)
        sums[j] = multiply_add(all(x[i]), load(w + i * n + first + j * kLanes), sums[j]);
    for (int64_t j = 0; j < kVectors; ++j) store(sums[j], y + first + j * kLanes);
    return;
  }
  for (; first + kLanes <= n; first += kLanes) {
    Floats total{};
    for (int64_t i = 0; i < k; ++i) total = multiply_add(all(x[i]), load(w + i * n + first), total);
    store(total, y + first);
  }
  for (; first < n; ++first) {
    float total = 0;
    for (int64_t i = 0; i < k; ++i) total += x[i] * number(w[i * n + first]);
    y[first] = total;
  }
}

using Integer32 = ffi::Buffer<ffi::S32>;

// x [m, k], w [layers, matrices, k, n], own [m], y [m, n].
ffi::Error own_matrix(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer w, Integer32 layer, Integer32 own,
                      ffi::Result<ffi::Buffer<ffi::F32>> y) {
  const auto of_w = w.dimensions();
  const int64_t matrices = of_w[1], k = of_w[2], n = of_w[3], rows = x.dimensions()[0];
  const int64_t first = std::clamp<int64_t>(*layer.typed_data(), 0, of_w[0] - 1) * matrices * k * n;
  const Buffer<float> x_MK = in_f32(x);
  const int64_t groups = (n + kColumns - 1) / kColumns;
  in_parallel(pool, rows * groups, [&](int64_t part) {
    const int64_t row = part / groups, column = part % groups * kColumns;
    const int64_t one_based = std::clamp<int64_t>(own.typed_data()[row], 0, matrices);
    float* to = y->typed_data() + row * n;
    if (one_based == 0) return void(std::fill_n(to + column, std::min(kColumns, n - column), 0.0f));
    const int64_t at = first + (one_based - 1) * k * n;
    const auto product = [&](const auto* numbers) { columns(x_MK.get() + row * k, numbers + at, k, n, column, to); };
    if (w.element_type() == ffi::F32)
      product(reinterpret_cast<const float*>(w.untyped_data()));
    else
      product(reinterpret_cast<const uint16_t*>(w.untyped_data()));
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace qlora

QLORA_HANDLER(own_matrix, qlora::own_matrix,
              ffi::Ffi::Bind()
                  .Ctx<ffi::ThreadPool>()
                  .Arg<ffi::AnyBuffer>()
                  .Arg<ffi::AnyBuffer>()
                  .Arg<qlora::Integer32>()
                  .Arg<qlora::Integer32>()
                  .Ret<ffi::Buffer<ffi::F32>>());
