// Causal bf16 attention on CPUs with AVX-512 and its bf16 products: two XLA FFI handlers.
//
//   attention_forward:   out = softmax(scale q k^T over visible keys) v, and the log2-sum-exp2 of each query's scores
//   attention_backward:  dq, dk, dv, from those; weights are recomputed
//
// Flash attention in tiles of 64 queries by 64 or 128 keys, whose scores stay in a core's caches. Scores and sums are
// f32. Weights and the scores' gradients are rounded to bf16 before their products, as in qlora_jax/nn/attention/causal.py,
// which defines the result.
//
// A product c += a b contracts pairs of 32 bits: one pair of `a` is broadcast, and the pairs of sixteen columns of `b`
// are a vector. So `b` is packed first, as [pairs, columns]; `a` is read in place, along either axis.
//
// Results do not depend on the number of threads: a query block's dq is summed in the order of keys, and each thread
// waits for its turn.

#if defined(__AVX512F__) && defined(__AVX512BF16__)

#include <cmath>
#include <cstring>
#include <thread>

#include "attention.h"
#include "buffer.h"
#include "parallel.h"

namespace ffi = xla::ffi;
using namespace qlora;

namespace {

constexpr int64_t kPairs = kBlock / 2;

// ---- products

// The strides of a left operand: pair p of row r is at[r * row + p * pair], in words of two bf16.
struct Left {
  const uint32_t* at;
  int64_t row, pair;
};

inline __m512bh pairs_of(__m512i words) { return reinterpret_cast<__m512bh&>(words); }

// c[R, 16 C] (+)= a[R, pairs] b[pairs, 16 C]; with Start::kFaded, rows of c are first multiplied by fade[r].
template <int R, int C, Start S>
inline void product(Left a, const uint32_t* b, int64_t b_stride, int64_t pairs, float* c, int64_t c_stride,
                    const float* fade) {
  __m512 sums[R][C];
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < C; ++j) {
      if constexpr (S == Start::kZero) sums[r][j] = _mm512_setzero_ps();
      if constexpr (S != Start::kZero) sums[r][j] = _mm512_loadu_ps(c + r * c_stride + 16 * j);
      if constexpr (S == Start::kFaded) sums[r][j] = _mm512_mul_ps(sums[r][j], _mm512_set1_ps(fade[r]));
    }
  for (int64_t p = 0; p < pairs; ++p) {
    __m512bh columns[C];
    for (int j = 0; j < C; ++j) columns[j] = pairs_of(_mm512_loadu_si512(b + p * b_stride + 16 * j));
    for (int r = 0; r < R; ++r) {
      const __m512bh row = pairs_of(_mm512_set1_epi32(static_cast<int>(a.at[r * a.row + p * a.pair])));
      for (int j = 0; j < C; ++j) sums[r][j] = _mm512_dpbf16_ps(sums[r][j], row, columns[j]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < C; ++j) _mm512_storeu_ps(c + r * c_stride + 16 * j, sums[r][j]);
}

// The same for 64 rows and any multiple of 16 columns.
template <Start S>
void block_product(Left a, const uint32_t* b, int64_t b_stride, int64_t pairs, int64_t columns, float* c,
                   int64_t c_stride, const float* fade = nullptr) {
  for (int64_t j = 0; j < columns; j += kBlock) {
    for (int64_t r = 0; r < kBlock; r += kRows) {
      const Left rows{a.at + r * a.row, a.row, a.pair};
      float* to = c + r * c_stride + j;
      const float* fades = S == Start::kFaded ? fade + r : nullptr;
      switch (std::min<int64_t>(columns - j, kBlock) / 16) {
        case 4: product<kRows, 4, S>(rows, b + j, b_stride, pairs, to, c_stride, fades); break;
        case 3: product<kRows, 3, S>(rows, b + j, b_stride, pairs, to, c_stride, fades); break;
        case 2: product<kRows, 2, S>(rows, b + j, b_stride, pairs, to, c_stride, fades); break;
        default: product<kRows, 1, S>(rows, b + j, b_stride, pairs, to, c_stride, fades);
      }
    }
  }
}

// ---- arrays

using Head = qlora::Head<uint16_t>;

inline uint32_t word(const uint16_t* at) {
  uint32_t value;
  std::memcpy(&value, at, 4);
  return value;
}

// A block's rows as a left operand: in place, or, if the block is partial, copied and padded with zeros.
Left rows_of(const Head& head, int64_t block, uint32_t* copy) {
  const int64_t there = head.rows_of(block);
  if (there == kBlock) return {reinterpret_cast<const uint32_t*>(head.row(block * kBlock)), head.stride / 2, 1};
  std::memset(copy, 0, kBlock * head.width * 2);
  for (int64_t r = 0; r < there; ++r)
    std::memcpy(copy + r * head.width / 2, head.row(block * kBlock + r), head.width * 2);
  return {copy, head.width / 2, 1};
}

// Packs a block's rows as the columns of a right operand: to[h / 2, 64], pairs of features.
void pack_columns(const Head& head, int64_t block, uint32_t* to) {
  const int64_t there = head.rows_of(block), pairs = head.width / 2;
  if (there < kBlock) std::memset(to, 0, pairs * kBlock * 4);
  for (int64_t r = 0; r < there; ++r) {
    const uint16_t* row = head.row(block * kBlock + r);
    for (int64_t p = 0; p < pairs; ++p) to[p * kBlock + r] = word(row + 2 * p);
  }
}

// Packs a block's rows as the rows of a right operand: to[32, h], pairs of rows.
void pack_rows(const Head& head, int64_t block, uint32_t* to) {
  const int64_t there = head.rows_of(block);
  const auto lanes = [&](int64_t r, int64_t h) {
    if (r >= there) return _mm512_setzero_si512();
    const auto* at = reinterpret_cast<const __m256i*>(head.row(block * kBlock + r) + h);
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(at));
  };
  for (int64_t p = 0; p < kPairs; ++p)
    for (int64_t h = 0; h < head.width; h += 16) {
      const __m512i pair = _mm512_or_si512(lanes(2 * p, h), _mm512_slli_epi32(lanes(2 * p + 1, h), 16));
      _mm512_storeu_si512(to + p * head.width + h, pair);
    }
}

// Writes a block's f32 rows [64, h], each multiplied by a factor, as bf16.
template <typename Factor>
void write_rows(const float* from, const Head& head, int64_t block, const Factor& factor) {
  for (int64_t r = 0; r < head.rows_of(block); ++r) {
    const __m512 by = _mm512_set1_ps(factor(r));
    uint16_t* row = head.row(block * kBlock + r);
    for (int64_t h = 0; h < head.width; h += 16) {
      __m256bh half = _mm512_cvtneps_pbh(_mm512_mul_ps(_mm512_loadu_ps(from + r * head.width + h), by));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(row + h), reinterpret_cast<__m256i&>(half));
    }
  }
}

// ---- weights

inline __m512bh rounded(__m512 low, __m512 high) { return _mm512_cvtne2ps_pbh(high, low); }
inline __m512i bits_of(__m512bh x) { return reinterpret_cast<__m512i&>(x); }

// ---- forward

struct Forward {
  Sizes s;
  const Visibility& visibility;
  float to_log2;  // converts a product to the log2 of a weight
  uint16_t *q, *k, *v, *out;
  float* lse;                        // [B, N, T]
  uint32_t *key_columns, *value_rows;  // packed, [B, K, blocks, h / 2, 64] and [B, K, blocks, 32, h]

  int64_t packed(int64_t b, int64_t kv_head, int64_t block) const {
    return ((b * s.k + kv_head) * s.blocks() + block) * kPairs * s.h;
  }

  void pack(int64_t part) const {
    const int64_t block = part % s.blocks(), kv_head = part / s.blocks() % s.k, b = part / s.blocks() / s.k;
    pack_columns(Head::of(k, s, s.k, b, kv_head), block, key_columns + packed(b, kv_head, block));
    pack_rows(Head::of(v, s, s.k, b, kv_head), block, value_rows + packed(b, kv_head, block));
  }

  // Computes one block of queries of one head, the longest first.
  void block(int64_t part) const {
    const int64_t heads = s.b * s.n, i = s.blocks() - 1 - part / heads;
    const int64_t b = part % heads / s.n, n = part % heads % s.n, kv_head = n / s.groups();
    Buffer<uint32_t> copy(kPairs * s.h), weights(kBlock * kMostKeys / 2);
    Buffer<float> scores(kBlock * kMostKeys), sums(kBlock * s.h), of_rows(4 * kBlock);
    float *top = of_rows.get(), *total = top + kBlock, *added = total + kBlock, *fade = added + kBlock;
    std::fill(top, top + kBlock, kMasked);
    std::fill(total, total + kBlock, 0.0f);
    std::fill(sums.get(), sums.get() + kBlock * s.h, 0.0f);
    const Left queries = rows_of(Head::of(q, s, s.n, b, n), i, copy.get());
    for (int64_t j = visibility.first_keys(i), next; j <= i; j = next) {
      if (visibility.nothing(b, i, j)) {
        next = j + 1;
        continue;
      }
      next = std::min(j + 2, i + 1);
      if (next == j + 2 && visibility.nothing(b, i, j + 1)) --next;
      const int64_t keys = (next - j) * kBlock;
      for (int64_t each = j; each < next; ++each)
        block_product<Start::kZero>(queries, key_columns + packed(b, kv_head, each), kBlock, s.h / 2, kBlock,
                                    scores.get() + (each - j) * kBlock, kMostKeys);
      const bool masked = !visibility.everything(b, i, j) || !visibility.everything(b, i, next - 1);
      for (int64_t r = 0; r < kBlock; ++r)
        row(b, i * kBlock + r, j * kBlock, keys, masked, scores.get() + r * kMostKeys, &top[r], &added[r], &fade[r],
            weights.get() + r * kMostKeys / 2);
      for (int64_t r = 0; r < kBlock; r += 16) {
        const __m512 fades = exp2(_mm512_loadu_ps(fade + r));
        _mm512_storeu_ps(fade + r, fades);
        const __m512 both = _mm512_fmadd_ps(_mm512_loadu_ps(total + r), fades, _mm512_loadu_ps(added + r));
        _mm512_storeu_ps(total + r, both);
      }
      block_product<Start::kFaded>({weights.get(), kMostKeys / 2, 1}, value_rows + packed(b, kv_head, j), s.h, keys / 2,
                                   s.h, sums.get(), s.h, fade);
    }
    write_rows(sums.get(), Head::of(out, s, s.n, b, n), i, [&](int64_t r) { return 1.0f / total[r]; });
    for (int64_t r = 0; r < std::min(kBlock, s.t - i * kBlock); ++r)
      lse[(b * s.n + n) * s.t + i * kBlock + r] = top[r] * to_log2 + std::log2(total[r]);
  }

  // Converts one query's scores of `keys` keys to weights 2^(score - top), and returns the sum of the rounded weights,
  // the new top, and the log2 of the factor for earlier sums. Masked keys weigh 2^0 while no key has been seen: the
  // query's own key, in the last tile, fades that to 0.
  void row(int64_t b, int64_t t, int64_t first, int64_t keys, bool masked, float* scores, float* top, float* added,
           float* fade, uint32_t* weights) const {
    if (masked)
      for (int64_t s16 = 0; s16 < keys; s16 += 16) {
        const __m512 x = _mm512_loadu_ps(scores + s16), hidden = _mm512_set1_ps(kMasked);
        _mm512_storeu_ps(scores + s16, _mm512_mask_blend_ps(visibility.of(b, t, first + s16), hidden, x));
      }
    __m512 most = _mm512_set1_ps(*top);
    for (int64_t s16 = 0; s16 < keys; s16 += 16) most = _mm512_max_ps(most, _mm512_loadu_ps(scores + s16));
    const float now = _mm512_reduce_max_ps(most);
    const __m512 above = _mm512_set1_ps(now), by = _mm512_set1_ps(to_log2);
    const __m512bh ones = pairs_of(_mm512_set1_epi32(0x3f803f80));
    __m512 sum = _mm512_setzero_ps();
    for (int64_t s32 = 0; s32 < keys; s32 += 32) {
      const auto weight = [&](int64_t at) {
        return exp2(_mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(scores + at), above), by));
      };
      const __m512bh both = rounded(weight(s32), weight(s32 + 16));
      sum = _mm512_dpbf16_ps(sum, both, ones);
      _mm512_storeu_si512(weights + s32 / 2, bits_of(both));
    }
    *added = _mm512_reduce_add_ps(sum);
    *fade = (*top - now) * to_log2;
    *top = now;
  }
};

// ---- backward

struct Backward {
  Sizes s;
  const Visibility& visibility;
  float scale, to_log2;
  uint16_t *q, *k, *v, *out, *d_out, *dq, *dk, *dv;
  const float* lse;                       // [B, N, T]
  float *mean, *sums;                     // [B, N, padded] and [B, N, padded, h]: out . d_out of each query; dq
  uint32_t *query_rows, *d_out_rows;      // packed, [B, N, blocks, 32, h]
  std::atomic<int64_t>* turns;            // [B, N, blocks]: the block of keys that adds to dq next

  int64_t head(int64_t b, int64_t n) const { return b * s.n + n; }
  int64_t packed(int64_t b, int64_t n, int64_t block) const { return (head(b, n) * s.blocks() + block) * kPairs * s.h; }

  void prepare(int64_t part) const {
    const int64_t i = part % s.blocks(), n = part / s.blocks() % s.n, b = part / s.blocks() / s.n;
    const Head of_out = Head::of(out, s, s.n, b, n), of_d_out = Head::of(d_out, s, s.n, b, n);
    pack_rows(Head::of(q, s, s.n, b, n), i, query_rows + packed(b, n, i));
    pack_rows(of_d_out, i, d_out_rows + packed(b, n, i));
    std::fill_n(sums + 2 * packed(b, n, i), kBlock * s.h, 0.0f);
    turns[head(b, n) * s.blocks() + i].store(visibility.first_keys(i), std::memory_order_relaxed);
    for (int64_t r = 0; r < of_out.rows_of(i); ++r) {
      const uint16_t *x = of_out.row(i * kBlock + r), *y = of_d_out.row(i * kBlock + r);
      __m512 sum = _mm512_setzero_ps();
      for (int64_t h = 0; h < s.h; h += 32)
        sum = _mm512_dpbf16_ps(sum, pairs_of(_mm512_loadu_si512(x + h)), pairs_of(_mm512_loadu_si512(y + h)));
      mean[head(b, n) * s.padded() + i * kBlock + r] = _mm512_reduce_add_ps(sum);
    }
  }

  // Scratch of a tile: 64 x 64 each, except copies of rows.
  struct Scratch {
    Buffer<uint32_t> q_copy, d_out_copy, weights, d_scores_pairs, d_scores;
    Buffer<float> scores, d_weights;
    explicit Scratch(int64_t h)
        : q_copy(kPairs * h), d_out_copy(kPairs * h), weights(kPairs * kBlock), d_scores_pairs(kPairs * kBlock),
          d_scores(kPairs * kBlock), scores(kBlock * kBlock), d_weights(kBlock * kBlock) {}
  };

  // Computes one block of keys, for all heads that share it; blocks start in order.
  void block(int64_t part) const {
    const int64_t j = part % s.blocks(), kv_head = part / s.blocks() % s.k, b = part / s.blocks() / s.k;
    const Head keys = Head::of(k, s, s.k, b, kv_head), values = Head::of(v, s, s.k, b, kv_head);
    Buffer<uint32_t> key_columns(kPairs * s.h), value_columns(kPairs * s.h), key_rows(kPairs * s.h);
    Buffer<float> dk_sums(kBlock * s.h), dv_sums(kBlock * s.h);
    Scratch scratch(s.h);
    pack_columns(keys, j, key_columns.get());
    pack_columns(values, j, value_columns.get());
    pack_rows(keys, j, key_rows.get());
    std::fill_n(dk_sums.get(), kBlock * s.h, 0.0f);
    std::fill_n(dv_sums.get(), kBlock * s.h, 0.0f);
    for (int64_t n = kv_head * s.groups(); n < (kv_head + 1) * s.groups(); ++n)
      for (int64_t i = j; i <= visibility.last_queries(j); ++i) {
        const bool nothing = visibility.nothing(b, i, j);
        if (!nothing) {
          tile(b, n, i, j, key_columns.get(), value_columns.get(), scratch);
          const Left weights{scratch.weights.get(), 1, kBlock}, d_scores{scratch.d_scores_pairs.get(), 1, kBlock};
          const int64_t at = packed(b, n, i);
          block_product<Start::kSum>(weights, d_out_rows + at, s.h, kPairs, s.h, dv_sums.get(), s.h);
          block_product<Start::kSum>(d_scores, query_rows + at, s.h, kPairs, s.h, dk_sums.get(), s.h);
        }
        add_to_dq(b, n, i, j, nothing ? nullptr : scratch.d_scores.get(), key_rows.get());
      }
    write_rows(dk_sums.get(), Head::of(dk, s, s.k, b, kv_head), j, [this](int64_t) { return scale; });
    write_rows(dv_sums.get(), Head::of(dv, s, s.k, b, kv_head), j, [](int64_t) { return 1.0f; });
  }

  // Computes weights and the scores' gradients of one tile, in the form that the products read.
  void tile(int64_t b, int64_t n, int64_t i, int64_t j, const uint32_t* key_columns, const uint32_t* value_columns,
            Scratch& scratch) const {
    const Left queries = rows_of(Head::of(q, s, s.n, b, n), i, scratch.q_copy.get());
    const Left d_outs = rows_of(Head::of(d_out, s, s.n, b, n), i, scratch.d_out_copy.get());
    block_product<Start::kZero>(queries, key_columns, kBlock, s.h / 2, kBlock, scratch.scores.get(), kBlock);
    block_product<Start::kZero>(d_outs, value_columns, kBlock, s.h / 2, kBlock, scratch.d_weights.get(), kBlock);
    const bool masked = !visibility.everything(b, i, j);
    for (int64_t p = 0; p < kPairs; ++p) {
      Pair even = row(b, n, i, j, 2 * p, masked, scratch), odd = row(b, n, i, j, 2 * p + 1, masked, scratch);
      for (int64_t half = 0; half < 2; ++half) {
        interleave(even.weights[half], odd.weights[half], scratch.weights.get() + p * kBlock + 32 * half);
        interleave(even.d_scores[half], odd.d_scores[half], scratch.d_scores_pairs.get() + p * kBlock + 32 * half);
        uint32_t* rows = scratch.d_scores.get() + 2 * p * kPairs + 16 * half;
        _mm512_storeu_si512(rows, even.d_scores[half]);
        _mm512_storeu_si512(rows + kPairs, odd.d_scores[half]);
      }
    }
  }

  struct Pair {  // the halves of a row of 64, in bf16
    __m512i weights[2], d_scores[2];
  };

  Pair row(int64_t b, int64_t n, int64_t i, int64_t j, int64_t r, bool masked, Scratch& scratch) const {
    const int64_t t = i * kBlock + r;
    const float top = t < s.t ? lse[head(b, n) * s.t + t] : -kMasked;  // rows past the end have no weights
    const float of_mean = t < s.t ? mean[head(b, n) * s.padded() + t] : 0.0f;
    const __m512 above = _mm512_set1_ps(top), means = _mm512_set1_ps(of_mean), by = _mm512_set1_ps(to_log2);
    const float *scores = scratch.scores.get() + r * kBlock, *d_weights = scratch.d_weights.get() + r * kBlock;
    Pair result;
    for (int64_t half = 0; half < 2; ++half) {
      const auto weight = [&](int64_t at) {
        const __m512 w = exp2(_mm512_fmsub_ps(_mm512_loadu_ps(scores + at), by, above));
        return masked ? _mm512_maskz_mov_ps(visibility.of(b, t, j * kBlock + at), w) : w;
      };
      const __m512bh both = rounded(weight(32 * half), weight(32 * half + 16));
      result.weights[half] = bits_of(both);
      const __m512i low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(bits_of(both)));
      const __m512i high = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(bits_of(both), 1));
      const auto gradient = [&](__m512i weights, int64_t at) {
        const __m512 w = _mm512_castsi512_ps(_mm512_slli_epi32(weights, 16));
        return _mm512_mul_ps(w, _mm512_sub_ps(_mm512_loadu_ps(d_weights + at), means));
      };
      result.d_scores[half] = bits_of(rounded(gradient(low, 32 * half), gradient(high, 32 * half + 16)));
    }
    return result;
  }

  // Pairs of two rows: to[32] = (odd << 16) | even.
  static void interleave(__m512i even, __m512i odd, uint32_t* to) {
    const auto lanes = [](__m256i x) { return _mm512_cvtepu16_epi32(x); };
    const __m512i low = _mm512_or_si512(lanes(_mm512_castsi512_si256(even)),
                                        _mm512_slli_epi32(lanes(_mm512_castsi512_si256(odd)), 16));
    const __m512i high = _mm512_or_si512(lanes(_mm512_extracti64x4_epi64(even, 1)),
                                         _mm512_slli_epi32(lanes(_mm512_extracti64x4_epi64(odd, 1)), 16));
    _mm512_storeu_si512(to, low);
    _mm512_storeu_si512(to + 16, high);
  }

  // Adds d_scores keys to dq of block i, after all earlier keys; its own keys come last.
  void add_to_dq(int64_t b, int64_t n, int64_t i, int64_t j, const uint32_t* d_scores, const uint32_t* key_rows) const {
    std::atomic<int64_t>& turn = turns[head(b, n) * s.blocks() + i];
    for (int64_t tries = 0; turn.load(std::memory_order_acquire) != j; ++tries) {
      if (tries < 4096)
        _mm_pause();
      else
        std::this_thread::yield();
    }
    float* to = sums + 2 * packed(b, n, i);
    if (d_scores != nullptr) block_product<Start::kSum>({d_scores, kPairs, 1}, key_rows, s.h, kPairs, s.h, to, s.h);
    if (i == j) write_rows(to, Head::of(dq, s, s.n, b, n), i, [this](int64_t) { return scale; });
    turn.store(j + 1, std::memory_order_release);
  }
};

// ---- handlers

using Numbers = ffi::Buffer<ffi::BF16>;

uint16_t* bits(Numbers x) { return reinterpret_cast<uint16_t*>(x.typed_data()); }
uint16_t* bits(ffi::Result<Numbers> x) { return reinterpret_cast<uint16_t*>(x->typed_data()); }

Sizes sizes_of(const Numbers& q, const Numbers& k) {
  const auto of_q = q.dimensions();
  return {of_q[0], of_q[1], of_q[2], k.dimensions()[2], of_q[3]};
}

// texts: [B, T], [3, B, T], or [0, 0] if each row is one text.
// The Python side ensures that shapes agree and that H is a multiple of 32. Packed arrays are results, so XLA accounts
// for them.
ffi::Error forward(ffi::ThreadPool pool, Numbers q, Numbers k, Numbers v, ffi::Buffer<ffi::S32> texts, double scale,
                   int64_t window, ffi::Result<Numbers> out, ffi::Result<ffi::Buffer<ffi::F32>> lse,
                   ffi::Result<ffi::Buffer<ffi::U32>> key_columns, ffi::Result<ffi::Buffer<ffi::U32>> value_rows) {
  const Sizes s = sizes_of(q, k);
  const Visibility visibility(s, window, Texts::of(texts));
  const Forward task{s, visibility, static_cast<float>(scale * kLog2E), bits(q), bits(k), bits(v), bits(out),
                     lse->typed_data(), key_columns->typed_data(), value_rows->typed_data()};
  qlora::in_parallel(pool, s.b * s.k * s.blocks(), [&](int64_t part) { task.pack(part); });
  qlora::in_parallel(pool, s.b * s.n * s.blocks(), [&](int64_t part) { task.block(part); });
  return ffi::Error::Success();
}

ffi::Error backward(ffi::ThreadPool pool, Numbers q, Numbers k, Numbers v, ffi::Buffer<ffi::S32> texts,
                    double scale, int64_t window, Numbers out, ffi::Buffer<ffi::F32> lse, Numbers d_out,
                    ffi::Result<Numbers> dq, ffi::Result<Numbers> dk,
                    ffi::Result<Numbers> dv, ffi::Result<ffi::Buffer<ffi::F32>> mean,
                    ffi::Result<ffi::Buffer<ffi::F32>> sums, ffi::Result<ffi::Buffer<ffi::U32>> query_rows,
                    ffi::Result<ffi::Buffer<ffi::U32>> d_out_rows) {
  const Sizes s = sizes_of(q, k);
  const Visibility visibility(s, window, Texts::of(texts));
  const auto turns = std::make_unique<std::atomic<int64_t>[]>(s.b * s.n * s.blocks());
  const Backward task{s, visibility, static_cast<float>(scale), static_cast<float>(scale * kLog2E),
                      bits(q), bits(k), bits(v), bits(out), bits(d_out), bits(dq), bits(dk), bits(dv),
                      lse.typed_data(), mean->typed_data(), sums->typed_data(), query_rows->typed_data(),
                      d_out_rows->typed_data(), turns.get()};
  qlora::in_parallel(pool, s.b * s.n * s.blocks(), [&](int64_t part) { task.prepare(part); });
  qlora::in_parallel(pool, s.b * s.k * s.blocks(), [&](int64_t part) { task.block(part); });
  return ffi::Error::Success();
}

}  // namespace

#define ATTENTION_OPERANDS       \
  Ctx<ffi::ThreadPool>()         \
      .Arg<Numbers>()            \
      .Arg<Numbers>()            \
      .Arg<Numbers>()            \
      .Arg<ffi::Buffer<ffi::S32>>() \
      .Attr<double>("scale")     \
      .Attr<int64_t>("window")

XLA_FFI_DEFINE_HANDLER_SYMBOL(attention_forward, forward,
                              ffi::Ffi::Bind()
                                  .ATTENTION_OPERANDS.Ret<Numbers>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::U32>>()
                                  .Ret<ffi::Buffer<ffi::U32>>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(attention_backward, backward,
                              ffi::Ffi::Bind()
                                  .ATTENTION_OPERANDS.Arg<Numbers>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<Numbers>()
                                  .Ret<Numbers>()
                                  .Ret<Numbers>()
                                  .Ret<Numbers>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::U32>>()
                                  .Ret<ffi::Buffer<ffi::U32>>());

#endif  // AVX-512 with bf16
