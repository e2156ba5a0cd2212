// Moments of rows, for norms whose bits do not depend on the number of rows: one XLA FFI handler.
//
//   row_moments:  y[m] = (mean, 1 / sqrt(mean of (x - mean)^2 + eps)) of x[m, :], of f32 or bf16 numbers, in f32; the
//                 mean is 0 unless rows are centered

#include <cmath>

#include "handler.h"

namespace ffi = xla::ffi;

namespace qlora {
namespace {

constexpr int64_t kGrain = 1 << 15;  // numbers per part, some microseconds

// The sum of (x - mean) or, if squared, of (x - mean)^2.
template <typename Element>
float row_sum(const Element* x, int64_t count, float mean, bool squared) {
  Floats sums{};
  const Floats below = all(-mean);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const Floats from_mean = load(x + i) + below;
    sums = squared ? multiply_add(from_mean, from_mean, sums) : sums + from_mean;
  }
  float total = sum(sums);
  for (; i < count; ++i) {
    const float from_mean = number(x[i]) - mean;
    total += squared ? from_mean * from_mean : from_mean;
  }
  return total;
}

ffi::Error row_moments(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Result<ffi::Buffer<ffi::F32>> y, bool centered,
                       float eps) {
  const int64_t rows = x.dimensions()[0], width = x.dimensions()[1];
  const int64_t each = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, width));
  in_parallel(pool, (rows + each - 1) / each, [&](int64_t part) {
    for (int64_t row = part * each; row < std::min(rows, (part + 1) * each); ++row) {
      const auto moments = [&](const auto* from) {
        float* to = y->typed_data() + 2 * row;
        to[0] = centered ? row_sum(from, width, 0, false) / width : 0;
        to[1] = 1 / std::sqrt(row_sum(from, width, to[0], true) / width + eps);
      };
      if (x.element_type() == ffi::F32)
        moments(reinterpret_cast<const float*>(x.untyped_data()) + row * width);
      else
        moments(reinterpret_cast<const uint16_t*>(x.untyped_data()) + row * width);
    }
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace qlora

QLORA_HANDLER(row_moments, qlora::row_moments,
              ffi::Ffi::Bind()
                  .Ctx<ffi::ThreadPool>()
                  .Arg<ffi::AnyBuffer>()
                  .Ret<ffi::Buffer<ffi::F32>>()
                  .Attr<bool>("centered")
                  .Attr<float>("eps"));
