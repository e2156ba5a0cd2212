// Product of f32 matrices on CPUs: one XLA FFI handler.
//
//   product_f32:  c[m, n] = sum_k a[m, k] b[k, n], or b[n, k] if transposed

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
