// Shared by the attention handlers of every dtype: sizes, visibility and exp2. Requires AVX-512.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace qlora {

constexpr int64_t kBlock = 64;             // queries per tile, and keys packed together
constexpr int64_t kMostKeys = 2 * kBlock;  // keys per tile of the forward pass
constexpr int64_t kRows = 4;               // result rows in registers, by 64 columns
constexpr float kMasked = -1e30f;          // finite: a row of only -inf would give NaN
constexpr double kLog2E = 1.4426950408889634;
constexpr float kExp2[] = {1.0000000754548972f,  0.6931471880262273f,   0.2402210748530968f,
                           0.05550357114222094f, 0.009676031918255982f, 0.001339086336353527f};

enum class Start { kZero, kSum, kFaded };  // the value to which a product is added

struct Sizes {
  int64_t b, t, n, k, h;
  int64_t groups() const { return n / k; }
  int64_t blocks() const { return (t + kBlock - 1) / kBlock; }
  int64_t padded() const { return blocks() * kBlock; }
};

// One head of an array [B, T, heads, H].
template <typename T>
struct Head {
  T* at;
  int64_t stride, rows, width;  // between rows; number of rows; H

  static Head of(T* data, const Sizes& s, int64_t heads, int64_t b, int64_t head) {
    return {data + (b * s.t * heads + head) * s.h, heads * s.h, s.t, s.h};
  }
  int64_t rows_of(int64_t block) const { return std::min(kBlock, rows - block * kBlock); }
  T* row(int64_t t) const { return at + t * stride; }
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
  // The mask of the keys [s, s + 16) that query t sees.
  __mmask16 of(int64_t b, int64_t t, int64_t s) const {
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    if (branching_) {
      const Spans spans = spans_of(b, t);
      const __m512i keys = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(s)), lanes);
      return within(keys, spans.first, t + 1) | within(keys, spans.trunk, spans.trunk_end);
    }
    const __m512i behind = _mm512_sub_epi32(_mm512_set1_epi32(static_cast<int>(t - s)), lanes);
    __mmask16 seen = _mm512_cmpge_epi32_mask(behind, _mm512_setzero_si512());
    seen &= _mm512_cmplt_epi32_mask(behind, _mm512_set1_epi32(static_cast<int>(window_)));
    if (ids_.empty()) return seen;
    const int32_t* row = &ids_[b * sizes_.padded()];
    return seen & _mm512_cmpeq_epi32_mask(_mm512_loadu_si512(row + s), _mm512_set1_epi32(row[t]));
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

  static __mmask16 within(__m512i keys, int64_t first, int64_t end) {
    return _mm512_cmpge_epi32_mask(keys, _mm512_set1_epi32(static_cast<int>(first))) &
           _mm512_cmplt_epi32_mask(keys, _mm512_set1_epi32(static_cast<int>(end)));
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

// 2^x for x <= 0, within 3e-7; 0 far below 2^-126. The polynomial equals 2^f at the Chebyshev points of [-1/2, 1/2].
inline __m512 exp2(__m512 x) {
  const __m512 nearest = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_sub_ps(x, nearest);
  __m512 power = _mm512_set1_ps(kExp2[5]);
  for (int i = 4; i >= 0; --i) power = _mm512_fmadd_ps(power, f, _mm512_set1_ps(kExp2[i]));
  return _mm512_scalef_ps(power, nearest);
}

}  // namespace qlora
