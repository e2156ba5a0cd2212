// Attention of few queries over a key-value cache, in f32 or bf16: one XLA FFI handler.
//
//   attention_cached:  out = softmax(scores, over visible slots) v, of one layer of a cache
//
// A query reads only the slots that it sees. Scores and sums are f32; weights are rounded to the cache's dtype, as in
// pallas_kernels/attention/reference.py, which defines the result.

#include <cmath>

#include "attention.h"
#include "handler.h"

namespace ffi = xla::ffi;

namespace qlora {
namespace {

template <typename Element>
struct Cached {
  Sizes s;  // t: queries of a row
  int64_t slots, window;
  Scaling scaling;
  const float *q, *sinks;    // [B, T, N, H]; [N], or nullptr
  const Element *k, *v;      // [B, K, slots, H]
  const int32_t* positions;  // [B, T]
  float* out;                // [B, T, N, H]

  // Computes one head of one query.
  void query(int64_t part) const {
    const int64_t n = part % s.n, t = part / s.n % s.t, b = part / s.n / s.t;
    const int64_t last = std::clamp<int64_t>(positions[b * s.t + t], 0, slots - 1);
    const int64_t first = window > 0 ? std::max<int64_t>(0, last - window + 1) : 0, count = last - first + 1;
    const int64_t at = ((b * s.k + n / s.groups()) * slots + first) * s.h;
    Buffer<float> weights(count + kLanes);
    const float* row = q + ((b * s.t + t) * s.n + n) * s.h;
    for (int64_t i = 0; i < count; ++i) weights.get()[i] = dot(row, k + at + i * s.h);
    const float factor = softmax(weights.get(), count, sinks == nullptr ? nullptr : sinks + n);
    float* to = out + ((b * s.t + t) * s.n + n) * s.h;
    for (int64_t h = 0; h < s.h; h += kLanes) values(weights.get(), factor, v + at, count, h, to);
  }

  float dot(const float* x, const Element* y) const {
    Floats products{};
    int64_t h = 0;
    for (; h + kLanes <= s.h; h += kLanes) products = multiply_add(load(x + h), load(y + h), products);
    float whole = sum(products);
    for (; h < s.h; ++h) whole += x[h] * number(y[h]);
    return whole;
  }

  // Replaces products by exp(score - the greatest one), and returns 1 / their sum. A sink takes part in the sum.
  float softmax(float* x, int64_t count, const float* sink) const {
    std::fill_n(x + count, kLanes, kMasked);
    Floats most = all(kMasked);
    for (int64_t i = 0; i < count; i += kLanes) {
      Floats scores = load(x + i);
      if (scaling.cap > 0) scores = scaling.cap * tanh(scores * (scaling.scale / scaling.cap));
      if (i + kLanes > count) scores = lane_numbers() < static_cast<int32_t>(count - i) ? scores : all(kMasked);
      store(scores, x + i);
      most = max(most, scores);
    }
    const float log2_of_sink = sink == nullptr ? kMasked : *sink * static_cast<float>(kLog2E);
    const float top = std::max(greatest(most) * scaling.to_log2(), log2_of_sink);
    const Floats by = all(scaling.to_log2()), below = all(-top);
    Floats total{};
    for (int64_t i = 0; i < count; i += kLanes) {
      const Floats powers = exp2(multiply_add(load(x + i), by, below));
      store(powers, x + i);
      total += powers;
    }
    return 1.0f / (sum(total) + (sink == nullptr ? 0.0f : std::exp2(log2_of_sink - top)));
  }

  // Sums the features [h, h + kLanes) of values, by weights that are rounded as values are.
  void values(const float* weights, float factor, const Element* from, int64_t count, int64_t h, float* to) const {
    Floats total{};
    const bool whole = h + kLanes <= s.h;
    for (int64_t i = 0; i < count; ++i) {
      Element weight;
      put(weights[i] * factor, &weight);
      const Element* row = from + i * s.h + h;
      if (whole) {
        total = multiply_add(all(number(weight)), load(row), total);
      } else {
        for (int64_t each = 0; each < s.h - h; ++each) total[each] += number(weight) * number(row[each]);
      }
    }
    std::memcpy(to + h, &total, std::min(kLanes, s.h - h) * sizeof(float));
  }
};

using Integer32 = ffi::Buffer<ffi::S32>;

// k, v: [L, B, K, slots, H]; sinks: [N], or [0] if there are none.
ffi::Error cached(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v, Integer32 layer,
                  Integer32 positions, Integer32 window, ffi::Buffer<ffi::F32> sinks, double scale, double cap,
                  ffi::Result<ffi::Buffer<ffi::F32>> out) {
  const auto of_q = q.dimensions(), of_k = k.dimensions();
  const Sizes s{of_q[0], of_q[1], of_q[2], of_k[2], of_q[3]};
  Buffer<float> queries = in_f32(q);
  const int64_t each = s.b * s.k * of_k[3] * s.h, at = each * std::clamp<int64_t>(*layer.typed_data(), 0, of_k[0] - 1);
  return with_element(k, [&](auto example) {
    using Element = decltype(example);
    const Cached<Element> task{s, of_k[3], *window.typed_data(),
                               {static_cast<float>(scale), static_cast<float>(cap)}, queries.get(),
                               sinks.element_count() == 0 ? nullptr : sinks.typed_data(), data_of<Element>(k) + at,
                               data_of<Element>(v) + at, positions.typed_data(), out->typed_data()};
    in_parallel(pool, s.b * s.t * s.n, [&](int64_t part) { task.query(part); });
    return ffi::Error::Success();
  });
}

}  // namespace
}  // namespace qlora

QLORA_HANDLER(attention_cached, qlora::cached,
              ffi::Ffi::Bind()
                  .Ctx<ffi::ThreadPool>()
                  .Arg<ffi::AnyBuffer>()
                  .Arg<ffi::AnyBuffer>()
                  .Arg<ffi::AnyBuffer>()
                  .Arg<qlora::Integer32>()
                  .Arg<qlora::Integer32>()
                  .Arg<qlora::Integer32>()
                  .Arg<ffi::Buffer<ffi::F32>>()
                  .Attr<double>("scale")
                  .Attr<double>("cap")
                  .Ret<ffi::Buffer<ffi::F32>>());
