// Shared by the handlers of attention: sizes, the map from products to scores, which keys each query sees, and products
// of tiles of queries and keys.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "terms.h"
#include "xla/ffi/api/ffi.h"

namespace qlora {

constexpr int64_t kBlock = 64;              // queries per tile, and keys packed together
constexpr int64_t kMostKeys = 2 * kBlock;   // keys per tile of a forward pass
constexpr int64_t kWidth = 16;              // packed rows are padded to a multiple of as many features
constexpr int64_t kTileRows = 4;            // result rows in registers, by kTileVectors vectors of columns
constexpr int64_t kTileVectors = kLanes == 8 ? 2 : 4;
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

// ---- products of tiles

enum class Start { kZero, kSum, kFaded };  // the value to which a product is added

// A left operand: term p of row r is at[r * row + p * term].
template <typename Word>
struct Left {
  const Word* at;
  int64_t row, term;
};

// c[R, C vectors] (+)= a[R, terms] b[terms, C vectors]; with Start::kFaded, rows of c are first multiplied by fade[r].
template <typename T, int R, int C, Start S>
__attribute__((always_inline))  // a call costs 5 % of heads of 64 features
inline void product(Left<typename T::Word> a, const typename T::Word* b, int64_t b_stride, int64_t terms, float* c,
                    int64_t c_stride, const float* fade) {
  Floats sums[R][C];
#pragma GCC unroll 4  // else GCC keeps sums in memory
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < C; ++j) {
      sums[r][j] = S == Start::kZero ? Floats{} : load(c + r * c_stride + kLanes * j);
      if constexpr (S == Start::kFaded) sums[r][j] *= fade[r];
    }
  for (int64_t p = 0; p < terms; ++p) {
    typename T::Words columns[C];
    for (int j = 0; j < C; ++j) columns[j] = load<typename T::Words>(b + p * b_stride + kLanes * j);
    for (int r = 0; r < R; ++r) {
      const typename T::Words row = T::broadcast(a.at[r * a.row + p * a.term]);
      for (int j = 0; j < C; ++j) sums[r][j] = T::add_product(row, columns[j], sums[r][j]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < C; ++j) store(sums[r][j], c + r * c_stride + kLanes * j);
}

// The same for up to 64 rows, rounded up to a multiple of kTileRows, and any multiple of kWidth columns.
template <typename T, Start S>
void block_product(Left<typename T::Word> a, const typename T::Word* b, int64_t b_stride, int64_t terms,
                   int64_t columns, float* c, int64_t c_stride, const float* fade = nullptr, int64_t rows = kBlock) {
  for (int64_t j = 0; j < columns; j += kTileVectors * kLanes)
    for (int64_t r = 0; r < rows; r += kTileRows) {
      const Left<typename T::Word> left{a.at + r * a.row, a.row, a.term};
      float* to = c + r * c_stride + j;
      const float* fades = S == Start::kFaded ? fade + r : nullptr;
      switch (std::min(columns - j, kTileVectors * kLanes) / kLanes) {
        case 4: product<T, kTileRows, 4, S>(left, b + j, b_stride, terms, to, c_stride, fades); break;
        case 3: product<T, kTileRows, 3, S>(left, b + j, b_stride, terms, to, c_stride, fades); break;
        case 2: product<T, kTileRows, 2, S>(left, b + j, b_stride, terms, to, c_stride, fades); break;
        default: product<T, kTileRows, 1, S>(left, b + j, b_stride, terms, to, c_stride, fades);
      }
    }
}

// Writes the weights 2^((score - top) by) of a query's keys, rounded to the numbers of terms, and returns their sum.
template <typename T>
float weigh(const float* scores, int64_t keys, float top, float by, typename T::Word* words) {
  const Floats above = all(top), factor = all(by);
  auto* weights = reinterpret_cast<typename T::Number*>(words);
  Floats total{};
  for (int64_t at = 0; at < keys; at += kLanes * T::kNumbers) {
    for (int64_t i = 0; i < T::kNumbers; ++i) {
      const int64_t next = at + i * kLanes;
      T::store(exp2((load(scores + next) - above) * factor), weights + next);
    }
    const auto stored = load<typename T::Words>(words + at / T::kNumbers);
    total = T::add_product(stored, T::broadcast(T::kOne), total);
  }
  return sum(total);
}

// ---- heads

// One head of an array [B, T, heads, H].
template <typename Element>
struct Head {
  Element* at;
  int64_t stride, rows, width;  // between rows; number of rows; H

  static Head of(Element* data, const Sizes& s, int64_t heads, int64_t b, int64_t head) {
    return {data + (b * s.t * heads + head) * s.h, heads * s.h, s.t, s.h};
  }
  int64_t rows_of(int64_t block) const { return std::min(kBlock, rows - block * kBlock); }
  Element* row(int64_t t) const { return at + t * stride; }
  // Term p of a row; numbers past the row's end are zeros.
  typename Terms<Element>::Word word(const Element* row, int64_t p) const {
    constexpr int64_t kNumbers = Terms<Element>::kNumbers;
    if (kNumbers * (p + 1) <= width) return Terms<Element>::word(row + kNumbers * p);
    Element both[2] = {row[kNumbers * p], 0};
    return Terms<Element>::word(both);
  }
  int64_t terms() const { return (width + Terms<Element>::kNumbers - 1) / Terms<Element>::kNumbers; }
  int64_t padded() const { return (width + kWidth - 1) / kWidth * kWidth; }
};

// The bits of numbers [h, h + kLanes) of a row, as they are in the low part of a word; 0 past the row's end.
inline Integers lanes_of(const float* row, int64_t h, int64_t width) {
  if (h + kLanes <= width) return load<Integers>(row + h);
  Integers lanes{};
  for (int64_t i = 0; h + i < width; ++i) lanes[i] = load<int32_t>(row + h + i);
  return lanes;
}
inline Integers lanes_of(const uint16_t* row, int64_t h, int64_t width) {
  if (h + kLanes <= width) return widened(load<Shorts>(row + h));
  Integers lanes{};
  for (int64_t i = 0; h + i < width; ++i) lanes[i] = row[h + i];
  return lanes;
}

// A block's rows as a left operand: in place, or copied if the block is partial or its numbers are converted.
template <typename Element, typename Word>
Left<Word> rows_of(const Head<Element>& head, int64_t block, Word* copy) {
  using T = Terms<Element>;
  const int64_t there = head.rows_of(block), terms = head.padded() / T::kNumbers;
  if (T::kInPlace && there == kBlock && head.width % T::kNumbers == 0)
    return {reinterpret_cast<const Word*>(head.row(block * kBlock)), head.stride / T::kNumbers, 1};
  std::memset(copy, 0, kBlock * terms * sizeof(Word));
  for (int64_t r = 0; r < there; ++r) {
    const Element* row = head.row(block * kBlock + r);
    if constexpr (T::kInPlace) {
      std::memcpy(copy + r * terms, row, head.width * sizeof(Element));
    } else {
      for (int64_t h = 0; h < head.width; h += kLanes)
        store(floats_of(lanes_of(row, h, head.width) << 16), copy + r * terms + h);
    }
  }
  return {copy, terms, 1};
}

// Packs a block's rows as the rows of a right operand: to[64 / numbers per term, padded width].
template <typename Element, typename Word>
void pack_rows(const Head<Element>& head, int64_t block, Word* to) {
  constexpr int64_t kNumbers = Terms<Element>::kNumbers;
  const int64_t there = head.rows_of(block);
  const auto lanes = [&](int64_t r, int64_t h) {
    return r < there ? lanes_of(head.row(block * kBlock + r), h, head.width) : Integers{};
  };
  for (int64_t p = 0; p < kBlock / kNumbers; ++p)
    for (int64_t h = 0; h < head.padded(); h += kLanes) {
      Integers words = lanes(kNumbers * p, h);
      if constexpr (kNumbers == 2) words |= lanes(2 * p + 1, h) << 16;
      if constexpr (sizeof(Element) < sizeof(Word) && kNumbers == 1) words <<= 16;
      std::memcpy(to + p * head.padded() + h, &words, sizeof words);
    }
}

// Writes a block's f32 rows [64, padded width], each multiplied by a factor.
template <typename Element, typename Factor>
void write_rows(const float* from, const Head<Element>& head, int64_t block, const Factor& factor) {
  for (int64_t r = 0; r < head.rows_of(block); ++r) {
    const float by = factor(r);
    Element* row = head.row(block * kBlock + r);
    const float* sums = from + r * head.padded();
    int64_t h = 0;
    for (; h + kLanes <= head.width; h += kLanes) store(load(sums + h) * by, row + h);
    for (; h < head.width; ++h) put(sums[h] * by, row + h);
  }
}

}  // namespace qlora
