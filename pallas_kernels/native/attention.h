// Shared by the handlers of attention: sizes, the map from products to scores, and which keys each query sees.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "lanes.h"
#include "xla/ffi/api/ffi.h"

namespace qlora {

constexpr int64_t kBlock = 64;     // queries per tile, and keys packed together
constexpr float kMasked = -1e30f;  // finite: a row of only -inf would give NaN
constexpr double kLog2E = 1.4426950408889634;

struct Sizes {
  int64_t b, t, n, k, h;
  int64_t groups() const { return n / k; }
  int64_t blocks() const { return (t + kBlock - 1) / kBlock; }
  int64_t padded() const { return blocks() * kBlock; }
};

// ---- scores

// The map from products of queries and keys to scores: scale product, or cap tanh(scale product / cap).
struct Scaling {
  float scale, cap;  // 0: no cap

  float to_log2() const { return static_cast<float>((cap > 0 ? 1.0 : scale) * kLog2E); }
  // Applies the cap to products [64, keys].
  void apply(float* scores, int64_t stride, int64_t keys) const {
    if (cap <= 0) return;
    for (int64_t r = 0; r < kBlock; ++r)
      for (int64_t s = 0; s < keys; s += kLanes) {
        float* at = scores + r * stride + s;
        store(cap * tanh(load(at) * (scale / cap)), at);
      }
  }
  // The derivative of a score by scale times its product.
  Floats slope(Floats score) const {
    const Floats x = score * (1.0f / cap);
    return 1.0f - x * x;
  }
};

// ---- visibility

// What a row consists of: ids of segments [B, T]; or, if rows have branches, the spans [3, B, T] of the keys that each
// query sees: [begin, query], and [trunk, begin - gap), whose keys are `gap` positions closer than in the row.
struct Texts {
  const int32_t* at;  // nullptr: each row is one text
  bool branching;

  template <typename Buffer>
  static Texts of(const Buffer& buffer) {
    return {buffer.element_count() == 0 ? nullptr : buffer.typed_data(), buffer.dimensions().size() == 3};
  }
};

// The keys that a query sees. Blocks have 64 positions.
class Visibility {
 public:
  Visibility(const Sizes& s, int64_t window, Texts texts)
      : sizes_(s),
        window_(window > 0 && window < s.t ? window : s.padded()),
        cut_(window_ < s.padded()),
        branching_(texts.branching) {
    if (texts.at == nullptr) return;
    const int64_t arrays = branching_ ? 3 : 1;
    ids_.resize(arrays * s.b * s.padded());
    for (int64_t row = 0; row < arrays * s.b; ++row)
      for (int64_t t = 0; t < s.padded(); ++t) ids_[row * s.padded() + t] = texts.at[row * s.t + std::min(t, s.t - 1)];
    if (branching_)
      count_seen();
    else
      for (int64_t block = 0; block < s.b * s.blocks(); ++block) {
        const auto [low, high] = std::minmax_element(&ids_[block * kBlock], &ids_[block * kBlock] + kBlock);
        lows_.push_back(*low);
        highs_.push_back(*high);
      }
  }

  // The first block of keys that block i of queries may see by position, and the last block of queries that may see
  // block j of keys.
  int64_t first_keys(int64_t i) const {
    return branching_ ? 0 : std::max<int64_t>(0, i * kBlock - window_ + 1) / kBlock;
  }
  int64_t last_queries(int64_t j) const {
    const int64_t last = sizes_.blocks() - 1;
    return branching_ ? last : std::min(last, (j * kBlock + kBlock - 1 + window_ - 1) / kBlock);
  }
  bool nothing(int64_t b, int64_t i, int64_t j) const {
    if (branching_) return some_[pair(b, i, j)] == 0;
    if (ids_.empty()) return false;
    const int64_t q = b * sizes_.blocks() + i, k = b * sizes_.blocks() + j;
    return lows_[q] > highs_[k] || lows_[k] > highs_[q];
  }
  bool everything(int64_t b, int64_t i, int64_t j) const {
    if (branching_) return whole_[pair(b, i, j)] == kBlock;
    if (i == j || (cut_ && (i - j) * kBlock + kBlock - 1 >= window_)) return false;
    if (ids_.empty()) return true;
    const int64_t q = b * sizes_.blocks() + i, k = b * sizes_.blocks() + j;
    return lows_[q] == highs_[q] && lows_[k] == highs_[k] && lows_[q] == lows_[k];
  }
  // Lanes of -1 for the keys from s on that query t sees, and of 0 for the others.
  Integers of(int64_t b, int64_t t, int64_t s) const {
    const Integers keys = static_cast<int32_t>(s) + lane_numbers();
    if (branching_) {
      const Spans spans = spans_of(b, t);
      return within(keys, spans.first, t + 1) | within(keys, spans.trunk, spans.trunk_end);
    }
    const Integers seen = within(keys, t - window_ + 1, t + 1);
    if (ids_.empty()) return seen;
    const int32_t* row = &ids_[b * sizes_.padded()];
    return seen & (load<Integers>(row + s) == row[t]);
  }

 private:
  // The keys that a query sees: [first, query], and [trunk, trunk_end) if that is not empty.
  struct Spans {
    int64_t first, trunk, trunk_end;
  };

  Spans spans_of(int64_t b, int64_t t) const {
    const int64_t each = sizes_.b * sizes_.padded(), at = b * sizes_.padded() + t;
    const int64_t begin = ids_[at], trunk = ids_[each + at], gap = ids_[2 * each + at];
    return {std::max(begin, t - window_ + 1), std::max(trunk, t - gap - window_ + 1), begin - gap};
  }

  static Integers within(Integers keys, int64_t first, int64_t end) {
    return (keys >= static_cast<int32_t>(first)) & (keys < static_cast<int32_t>(end));
  }

  int64_t pair(int64_t b, int64_t i, int64_t j) const { return (b * sizes_.blocks() + i) * sizes_.blocks() + j; }

  // Counts, for each block of queries and of keys, the queries that see a key of it, and those that see all of it.
  void count_seen() {
    some_.assign(sizes_.b * sizes_.blocks() * sizes_.blocks(), 0);
    whole_ = some_;
    for (int64_t b = 0; b < sizes_.b; ++b)
      for (int64_t t = 0; t < sizes_.padded(); ++t) {
        const Spans spans = spans_of(b, t);
        add(b, t / kBlock, spans.first, t + 1);
        add(b, t / kBlock, spans.trunk, spans.trunk_end);
      }
  }

  // Counts a query that sees the keys [first, end).
  void add(int64_t b, int64_t i, int64_t first, int64_t end) {
    if (first >= end) return;
    for (int64_t j = first / kBlock; j * kBlock < end; ++j) {
      ++some_[pair(b, i, j)];
      whole_[pair(b, i, j)] += first <= j * kBlock && (j + 1) * kBlock <= end;
    }
  }

  Sizes sizes_;
  int64_t window_;
  bool cut_, branching_;
  std::vector<int32_t> ids_, lows_, highs_;  // padded ids, or spans; bounds of ids per block
  std::vector<int32_t> some_, whole_;        // per block of queries and of keys
};

// ---- arrays

template <typename Element>
Element* data_of(const xla::ffi::AnyBuffer& x) {
  return reinterpret_cast<Element*>(x.untyped_data());
}
template <typename Element>
Element* data_of(const xla::ffi::Result<xla::ffi::AnyBuffer>& x) {
  return reinterpret_cast<Element*>(x->untyped_data());
}

// Calls run(number) with a number of the dtype that all arrays have.
template <typename Run>
xla::ffi::Error with_element(const xla::ffi::AnyBuffer& x, const Run& run) {
  if (x.element_type() == xla::ffi::F32) return run(float());
  if (x.element_type() == xla::ffi::BF16) return run(uint16_t());
  return xla::ffi::Error::InvalidArgument("attention has loops for f32 and bf16");
}

}  // namespace qlora
