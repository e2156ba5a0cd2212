// Searches for the scales of ggml's K-quants and of IQ4_NL: one XLA FFI handler.
//
//   scale_search:  y[:, s] = (scale, minimum, inverse, offset) of x[s, :], weights that share them; the search found the
//                  codes nearest to inverse (x - offset), and the weights scale code - minimum
//
// The arithmetic is that of make_qkx2_quants, make_qx_quants and quantize_row_iq4_nl_impl in ggml, to the bit. Each lane
// has a group of weights of its own, so that sums have ggml's order.

#include "handler.h"

namespace ffi = xla::ffi;

namespace qlora {
namespace {

constexpr int64_t kFound = 4;      // numbers per group
constexpr int64_t kGrain = 1 << 9;  // vectors of weights per part, some hundred microseconds

// Keeps subnormal numbers for its lifetime; XLA's threads flush them to zero.
class Subnormals {
#if defined(__x86_64__)
 public:
  Subnormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ & ~0x8040u); }
  ~Subnormals() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#else
 public:
  Subnormals() {
    __asm__ __volatile__("mrs %0, fpcr" : "=r"(before_));
    __asm__ __volatile__("msr fpcr, %0" : : "r"(before_ & ~(1ull << 24)));
  }
  ~Subnormals() { __asm__ __volatile__("msr fpcr, %0" : : "r"(before_)); }

 private:
  uint64_t before_;
#endif
};

inline Floats size_of(Floats x) { return floats_of(bits_of(x) & 0x7fffffff); }

// The nearest integers from `lowest` to `highest`, halves to even.
inline Floats nearest(Floats x, float lowest, float highest) {
  constexpr float kWhole = 12582912.0f;  // 1.5 * 2^23: a sum with it has no bits below 1
  x = x > lowest ? x : all(lowest);
  x = x < highest ? x : all(highest);
  return (x + kWhole) - kWhole;
}

// Codes 0 to `largest`, by least squares of errors that count sqrt(mean x^2) + |x|.
template <int kWidth>
void affine(const Floats* x, float largest, float first, int64_t steps, Floats* found) {
  Floats weights[kWidth], squares{};
  for (int i = 0; i < kWidth; ++i) squares += x[i] * x[i];
  Floats average = squares / static_cast<float>(kWidth);
  for (int i = 0; i < kLanes; ++i) average[i] = std::sqrt(average[i]);
  for (int i = 0; i < kWidth; ++i) weights[i] = average + size_of(x[i]);
  Floats lowest{}, highest = x[0], smallest = x[0], sum_w{}, sum_x{};
  for (int i = 0; i < kWidth; ++i) {
    smallest = x[i] < smallest ? x[i] : smallest;
    highest = x[i] > highest ? x[i] : highest;
    sum_w += weights[i];
    sum_x += weights[i] * x[i];
  }
  lowest = smallest > 0.0f ? lowest : smallest;

  const auto error = [&](Floats scale, Floats offset, const Floats* codes) {
    Floats total{};
    for (int i = 0; i < kWidth; ++i) {
      const Floats off = scale * codes[i] + offset - x[i];
      total += weights[i] * (off * off);
    }
    return total;
  };
  Floats codes[kWidth], inverse = largest / (highest - lowest), scale = 1.0f / inverse, offset = lowest;
  for (int i = 0; i < kWidth; ++i) codes[i] = nearest(inverse * (x[i] - lowest), 0, largest);
  Floats best = error(scale, lowest, codes), best_inverse = inverse, best_offset = lowest;
  for (int64_t step = 0; step <= steps; ++step) {
    inverse = (first + 0.1f * static_cast<float>(step) + largest) / (highest - offset);
    Floats sum_l{}, sum_l2{}, sum_xl{};
    for (int i = 0; i < kWidth; ++i) {
      codes[i] = nearest(inverse * (x[i] - offset), 0, largest);
      const Floats weighted = weights[i] * codes[i];
      sum_l += weighted;
      sum_l2 += weighted * codes[i];
      sum_xl += weighted * x[i];
    }
    const Floats determinant = sum_w * sum_l2 - sum_l * sum_l;
    Floats new_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant;
    Floats new_offset = (sum_l2 * sum_x - sum_l * sum_xl) / determinant;
    new_scale = new_offset > 0.0f ? sum_xl / sum_l2 : new_scale;
    new_offset = new_offset > 0.0f ? Floats{} : new_offset;
    const Floats now = error(new_scale, new_offset, codes);
    const Integers better = (determinant > 0.0f) & (now < best);
    best = better ? now : best;
    scale = better ? new_scale : scale;
    best_inverse = better ? inverse : best_inverse;
    best_offset = better ? offset : best_offset;
    offset = better ? new_offset : offset;
  }
  const Integers flat = highest == lowest;
  found[0] = flat ? Floats{} : scale;
  found[1] = -offset;
  found[2] = flat ? Floats{} : best_inverse;
  found[3] = best_offset;
}

// Codes of Q6_K.
struct Six {
  static constexpr int kWidth = 16, kTries = 9;
  static Floats first(Floats extreme) { return -32.0f / extreme; }
  static bool tries(int i) { return i != 0; }
  static float numerator(int i) { return -(32.0f + 0.1f * static_cast<float>(i)); }
  static Floats value(Floats x) { return nearest(x, -32, 31); }
  static Floats weighted(Floats square, Floats x, Floats code) { return square * x * code; }
};

// Values of IQ4_NL.
struct NonLinear {
  static constexpr int kWidth = 32, kTries = 7;
  static constexpr float kValues[] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
  static Floats first(Floats extreme) { return 1.0f / (extreme / 127.0f); }
  static bool tries(int) { return true; }
  static float numerator(int i) { return static_cast<float>(i) - 127.0f; }
  static Floats value(Floats x) {
    Floats nearest = all(kValues[0]);
#pragma GCC unroll 15
    for (int i = 0; i < 15; ++i) nearest = x >= 0.5f * (kValues[i] + kValues[i + 1]) ? all(kValues[i + 1]) : nearest;
    return nearest;
  }
  static Floats weighted(Floats square, Floats x, Floats value) { return square * value * x; }
};

// No minimum, and errors that count x^2.
template <typename Codes>
void symmetric(const Floats* x, Floats* found) {
  Floats extreme{}, size{};
  for (int i = 0; i < Codes::kWidth; ++i) {
    const Floats now = size_of(x[i]);
    extreme = now > size ? x[i] : extreme;
    size = max(now, size);
  }
  Floats sum_xl, sum_l2;
  const auto add = [&](Floats inverse) {
    sum_xl = sum_l2 = Floats{};
    for (int i = 0; i < Codes::kWidth; ++i) {
      const Floats code = Codes::value(inverse * x[i]), square = x[i] * x[i];
      sum_xl += Codes::weighted(square, x[i], code);
      sum_l2 += square * code * code;
    }
  };
  Floats best_inverse = Codes::first(extreme);
  add(best_inverse);
  Floats scale = sum_l2 > 0.0f ? sum_xl / sum_l2 : Floats{}, best = scale * sum_xl;
  for (int i = -Codes::kTries; i <= Codes::kTries; ++i) {
    if (!Codes::tries(i)) continue;
    const Floats inverse = Codes::numerator(i) / extreme;
    add(inverse);
    const Integers better = (sum_l2 > 0.0f) & (sum_xl * sum_xl > best * sum_l2);
    scale = better ? sum_xl / sum_l2 : scale;
    best = better ? scale * sum_xl : best;
    best_inverse = better ? inverse : best_inverse;
  }
  const Integers flat = size < 1e-15f;
  found[0] = flat ? Floats{} : scale;
  found[2] = flat ? Floats{} : best_inverse;
  found[1] = found[3] = Floats{};
}

void q4(const Floats* x, Floats* found) { affine<32>(x, 15, -1.0f, 20, found); }
void q5(const Floats* x, Floats* found) { affine<32>(x, 31, -0.5f, 15, found); }

struct Search {
  int64_t ggml_type, width;
  void (*run)(const Floats*, Floats*);
};
constexpr Search kSearches[] = {{12, 32, q4}, {13, 32, q5}, {14, 16, symmetric<Six>}, {20, 32, symmetric<NonLinear>}};

// Searches for kLanes groups from `first`; the last one fills lanes beyond the end.
void tile(const Search& search, const float* from, int64_t first, int64_t groups, float* to) {
  Floats x[32], found[kFound];
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    const float* weights = from + std::min(first + lane, groups - 1) * search.width;
    for (int64_t i = 0; i < search.width; ++i) x[i][lane] = weights[i];
  }
  search.run(x, found);
  for (int64_t i = 0; i < kFound; ++i)
    for (int64_t lane = 0; lane < std::min(kLanes, groups - first); ++lane) to[i * groups + first + lane] = found[i][lane];
}

// x [groups, width], y [kFound, groups].
ffi::Error scale_search(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Result<ffi::Buffer<ffi::F32>> y,
                        int64_t ggml_type) {
  const auto* search = std::find_if(std::begin(kSearches), std::end(kSearches),
                                    [&](const Search& each) { return each.ggml_type == ggml_type; });
  const int64_t groups = x.dimensions()[0], each = kGrain / search->width * kLanes;
  in_parallel(pool, (groups + each - 1) / each, [&](int64_t part) {
    const Subnormals kept;
    for (int64_t first = part * each; first < std::min(groups, (part + 1) * each); first += kLanes)
      tile(*search, x.typed_data(), first, groups, y->typed_data());
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace qlora

QLORA_HANDLER(scale_search, qlora::scale_search,
              ffi::Ffi::Bind()
                  .Ctx<ffi::ThreadPool>()
                  .Arg<ffi::Buffer<ffi::F32>>()
                  .Ret<ffi::Buffer<ffi::F32>>()
                  .Attr<int64_t>("ggml_type"));
