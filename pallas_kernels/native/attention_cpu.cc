// Causal attention on CPUs, in f32 or bf16: two XLA FFI handlers.
//
//   attention_forward:   out = softmax(scores, over visible keys) v, and the log2-sum-exp2 of each query's scores
//   attention_backward:  dq, dk, dv, from those; weights are recomputed
//
// Flash attention in tiles of 64 queries by 64 or 128 keys, whose scores stay in a core's caches. Scores and sums are
// f32. Weights and the scores' gradients are rounded to the numbers' dtype before their products, as in pallas_kernels/attention/tiles.py, which defines the result.
//
// A product c += a b contracts one term at a time: an f32 number, or a pair of bf16 numbers where the processor multiplies
// pairs. One term of `a` is broadcast, and the terms of a few columns of `b` are a vector. So `b` is packed first, as
// [terms, columns]; `a` is read along either axis, where it can be in place.
//
// Results do not depend on the number of threads: a query block's dq is summed in the order of keys, and each thread
// waits for its turn.

#include <cmath>
#include <thread>

#include "attention.h"
#include "handler.h"

namespace ffi = xla::ffi;

namespace qlora {
namespace {

// Packs a block's rows as the columns of a right operand: to[terms, 64].
template <typename Element, typename Word>
void pack_columns(const Head<Element>& head, int64_t block, Word* to) {
  const int64_t there = head.rows_of(block), terms = head.terms();
  if (there < kBlock) std::memset(to, 0, terms * kBlock * sizeof(Word));
  for (int64_t r = 0; r < there; ++r)
    for (int64_t p = 0; p < terms; ++p) to[p * kBlock + r] = head.word(head.row(block * kBlock + r), p);
}

// ---- forward

template <typename Element>
struct Forward {
  using T = Terms<Element>;
  using Word = typename T::Word;
  Sizes s;
  const Visibility& visibility;
  Scaling scaling;
  Element *q, *k, *v, *out;
  float* lse;                      // [B, N, T]
  Word *key_columns, *value_rows;  // packed, [B, K, blocks, words per block]

  int64_t width() const { return (s.h + kWidth - 1) / kWidth * kWidth; }
  int64_t packed(int64_t b, int64_t kv_head, int64_t block) const {
    return ((b * s.k + kv_head) * s.blocks() + block) * kBlock * width() / T::kNumbers;
  }

  void pack(int64_t part) const {
    const int64_t block = part % s.blocks(), kv_head = part / s.blocks() % s.k, b = part / s.blocks() / s.k;
    pack_columns(Head<Element>::of(k, s, s.k, b, kv_head), block, key_columns + packed(b, kv_head, block));
    pack_rows(Head<Element>::of(v, s, s.k, b, kv_head), block, value_rows + packed(b, kv_head, block));
  }

  // Memory of a block of queries: sums [64, width], scores and weights [64, 128], four numbers per query.
  struct Scratch {
    Buffer<Word> copy, weights;
    Buffer<float> sums, scores, of_rows;
    float *top, *total, *added, *fade;
    Left<Word> queries;
    explicit Scratch(int64_t width)
        : copy(kBlock * width), weights(kBlock * kMostKeys / T::kNumbers), sums(kBlock * width),
          scores(kBlock * kMostKeys), of_rows(4 * kBlock), top(of_rows.get()), total(top + kBlock),
          added(total + kBlock), fade(added + kBlock) {
      std::fill_n(top, kBlock, kMasked);
      std::fill_n(total, kBlock, 0.0f);
      std::fill_n(sums.get(), kBlock * width, 0.0f);
    }
  };

  // Computes one block of queries of one head, the longest first.
  void block(int64_t part) const {
    const int64_t heads = s.b * s.n, i = s.blocks() - 1 - part / heads;
    const int64_t b = part % heads / s.n, n = part % heads % s.n, kv_head = n / s.groups();
    Scratch scratch(width());
    scratch.queries = rows_of(Head<Element>::of(q, s, s.n, b, n), i, scratch.copy.get());
    for (int64_t j = visibility.first_keys(i), next; j <= i; j = next) {
      if (visibility.nothing(b, i, j)) {
        next = j + 1;
        continue;
      }
      next = std::min(j + 2, i + 1);
      if (next == j + 2 && visibility.nothing(b, i, j + 1)) --next;
      tile(b, i, j, next, kv_head, scratch);
    }
    const float *top = scratch.top, *total = scratch.total;
    write_rows(scratch.sums.get(), Head<Element>::of(out, s, s.n, b, n), i, [&](int64_t r) { return 1.0f / total[r]; });
    for (int64_t r = 0; r < std::min(kBlock, s.t - i * kBlock); ++r)
      lse[(b * s.n + n) * s.t + i * kBlock + r] = top[r] * scaling.to_log2() + std::log2(total[r]);
  }

  // Adds the contribution of the keys of blocks [j, next).
  void tile(int64_t b, int64_t i, int64_t j, int64_t next, int64_t kv_head, Scratch& scratch) const {
    const int64_t keys = (next - j) * kBlock, terms = (s.h + T::kNumbers - 1) / T::kNumbers;
    for (int64_t each = j; each < next; ++each)
      block_product<T, Start::kZero>(scratch.queries, key_columns + packed(b, kv_head, each), kBlock, terms, kBlock,
                                     scratch.scores.get() + (each - j) * kBlock, kMostKeys);
    scaling.apply(scratch.scores.get(), kMostKeys, keys);
    const bool masked = !visibility.everything(b, i, j) || !visibility.everything(b, i, next - 1);
    for (int64_t r = 0; r < kBlock; ++r) row(b, i * kBlock + r, j * kBlock, keys, masked, r, scratch);
    for (int64_t r = 0; r < kBlock; r += kLanes) {
      const Floats fades = exp2(load(scratch.fade + r));
      store(fades, scratch.fade + r);
      store(multiply_add(load(scratch.total + r), fades, load(scratch.added + r)), scratch.total + r);
    }
    const Left<Word> weights{scratch.weights.get(), kMostKeys / T::kNumbers, 1};
    block_product<T, Start::kFaded>(weights, value_rows + packed(b, kv_head, j), width(), keys / T::kNumbers, width(),
                                    scratch.sums.get(), width(), scratch.fade);
  }

  // Converts one query's scores of `keys` keys to weights 2^(score - top), and stores their sum, the new top and the log2
  // of the factor for earlier sums. Masked keys weigh 2^0 while no key has been seen: the query's own key, in the last
  // tile, fades that to 0.
  void row(int64_t b, int64_t t, int64_t first, int64_t keys, bool masked, int64_t r, Scratch& scratch) const {
    float* scores = scratch.scores.get() + r * kMostKeys;
    Word* words = scratch.weights.get() + r * kMostKeys / T::kNumbers;
    Floats most = all(scratch.top[r]);
    for (int64_t at = 0; at < keys; at += kLanes) {
      if (masked) store(visibility.of(b, t, first + at) ? load(scores + at) : all(kMasked), scores + at);
      most = max(most, load(scores + at));
    }
    const float now = greatest(most);
    scratch.added[r] = weigh<T>(scores, keys, now, scaling.to_log2(), words);
    scratch.fade[r] = (scratch.top[r] - now) * scaling.to_log2();
    scratch.top[r] = now;
  }
};

// ---- backward

template <typename Element>
struct Backward {
  using T = Terms<Element>;
  using Word = typename T::Word;
  using Number = typename T::Number;
  static constexpr int64_t kTerms = kBlock / T::kNumbers;  // of a block's rows
  Sizes s;
  const Visibility& visibility;
  Scaling scaling;
  Element *q, *k, *v, *out, *d_out, *dq, *dk, *dv;
  const float* lse;               // [B, N, T]
  float *mean, *sums;             // [B, N, padded] and [B, N, padded, width]: out . d_out of each query; dq
  Word *query_rows, *d_out_rows;  // packed, [B, N, blocks, words per block]
  std::atomic<int64_t>* turns;    // [B, N, blocks]: the block of keys that adds to dq next

  int64_t width() const { return (s.h + kWidth - 1) / kWidth * kWidth; }
  int64_t head(int64_t b, int64_t n) const { return b * s.n + n; }
  int64_t packed(int64_t b, int64_t n, int64_t block) const {
    return (head(b, n) * s.blocks() + block) * kTerms * width();
  }
  float* sums_of(int64_t b, int64_t n, int64_t i) const {
    return sums + (head(b, n) * s.blocks() + i) * kBlock * width();
  }

  void prepare(int64_t part) const {
    const int64_t i = part % s.blocks(), n = part / s.blocks() % s.n, b = part / s.blocks() / s.n;
    const auto of_out = Head<Element>::of(out, s, s.n, b, n), of_d_out = Head<Element>::of(d_out, s, s.n, b, n);
    pack_rows(Head<Element>::of(q, s, s.n, b, n), i, query_rows + packed(b, n, i));
    pack_rows(of_d_out, i, d_out_rows + packed(b, n, i));
    std::fill_n(sums_of(b, n, i), kBlock * width(), 0.0f);
    turns[head(b, n) * s.blocks() + i].store(visibility.first_keys(i), std::memory_order_relaxed);
    for (int64_t r = 0; r < of_out.rows_of(i); ++r) {
      const Element *x = of_out.row(i * kBlock + r), *y = of_d_out.row(i * kBlock + r);
      Floats products{};
      int64_t h = 0;
      for (; h + kLanes <= s.h; h += kLanes) products = multiply_add(load(x + h), load(y + h), products);
      float whole = sum(products);
      for (; h < s.h; ++h) whole += number(x[h]) * number(y[h]);
      mean[head(b, n) * s.padded() + i * kBlock + r] = whole;
    }
  }

  // Memory of a tile: 64 x 64 each, except copies of rows. Pairs of neighbouring rows are needed where terms are pairs.
  struct Scratch {
    Buffer<Word> q_copy, d_out_copy, weights, d_scores, weight_pairs, d_score_pairs;
    Buffer<float> scores, d_weights;
    explicit Scratch(int64_t width)
        : q_copy(kBlock * width), d_out_copy(kBlock * width), weights(kTerms * kBlock), d_scores(kTerms * kBlock),
          weight_pairs(kTerms * kBlock), d_score_pairs(kTerms * kBlock), scores(kBlock * kBlock),
          d_weights(kBlock * kBlock) {}
  };

  // Computes one block of keys, for all heads that share it; blocks start in order.
  void block(int64_t part) const {
    const int64_t j = part % s.blocks(), kv_head = part / s.blocks() % s.k, b = part / s.blocks() / s.k;
    const auto keys = Head<Element>::of(k, s, s.k, b, kv_head), values = Head<Element>::of(v, s, s.k, b, kv_head);
    Buffer<Word> key_columns(kBlock * width()), value_columns(kBlock * width()), key_rows(kTerms * width());
    Buffer<float> dk_sums(kBlock * width()), dv_sums(kBlock * width());
    Scratch scratch(width());
    pack_columns(keys, j, key_columns.get());
    pack_columns(values, j, value_columns.get());
    pack_rows(keys, j, key_rows.get());
    std::fill_n(dk_sums.get(), kBlock * width(), 0.0f);
    std::fill_n(dv_sums.get(), kBlock * width(), 0.0f);
    for (int64_t n = kv_head * s.groups(); n < (kv_head + 1) * s.groups(); ++n)
      for (int64_t i = j; i <= visibility.last_queries(j); ++i) {
        const bool nothing = visibility.nothing(b, i, j);
        if (!nothing) {
          tile(b, n, i, j, key_columns.get(), value_columns.get(), scratch);
          const Word* weights = columns_of(scratch.weights, scratch.weight_pairs);
          const Word* d_scores = columns_of(scratch.d_scores, scratch.d_score_pairs);
          add(weights, d_out_rows + packed(b, n, i), dv_sums.get());
          add(d_scores, query_rows + packed(b, n, i), dk_sums.get());
        }
        add_to_dq(b, n, i, j, nothing ? nullptr : scratch.d_scores.get(), key_rows.get());
      }
    const float scale = scaling.scale;
    write_rows(dk_sums.get(), Head<Element>::of(dk, s, s.k, b, kv_head), j, [scale](int64_t) { return scale; });
    write_rows(dv_sums.get(), Head<Element>::of(dv, s, s.k, b, kv_head), j, [](int64_t) { return 1.0f; });
  }

  // Adds the product of a tile's columns and packed rows of queries to sums of keys.
  void add(const Word* columns, const Word* rows, float* to) const {
    block_product<T, Start::kSum>({columns, 1, kBlock}, rows, width(), kTerms, width(), to, width());
  }

  // Computes weights and the scores' gradients of one tile.
  void tile(int64_t b, int64_t n, int64_t i, int64_t j, const Word* key_columns, const Word* value_columns,
            Scratch& scratch) const {
    const int64_t terms = (s.h + T::kNumbers - 1) / T::kNumbers;
    const auto queries = rows_of(Head<Element>::of(q, s, s.n, b, n), i, scratch.q_copy.get());
    const auto d_outs = rows_of(Head<Element>::of(d_out, s, s.n, b, n), i, scratch.d_out_copy.get());
    block_product<T, Start::kZero>(queries, key_columns, kBlock, terms, kBlock, scratch.scores.get(), kBlock);
    block_product<T, Start::kZero>(d_outs, value_columns, kBlock, terms, kBlock, scratch.d_weights.get(), kBlock);
    scaling.apply(scratch.scores.get(), kBlock, kBlock);
    const bool masked = !visibility.everything(b, i, j);
    for (int64_t r = 0; r < kBlock; ++r) row(b, n, i * kBlock + r, j * kBlock, r, masked, scratch);
  }

  void row(int64_t b, int64_t n, int64_t t, int64_t first, int64_t r, bool masked, Scratch& scratch) const {
    const float top = t < s.t ? lse[head(b, n) * s.t + t] : -kMasked;  // rows past the end have no weights
    const float of_mean = t < s.t ? mean[head(b, n) * s.padded() + t] : 0.0f;
    const float *scores = scratch.scores.get() + r * kBlock, *d_weights = scratch.d_weights.get() + r * kBlock;
    Number* weights = reinterpret_cast<Number*>(scratch.weights.get()) + r * kBlock;
    Number* d_scores = reinterpret_cast<Number*>(scratch.d_scores.get()) + r * kBlock;
    const Floats by = all(scaling.to_log2()), below = all(-top), means = all(of_mean);
    const bool capped = scaling.cap > 0;
    for (int64_t at = 0; at < kBlock; at += kLanes) {
      const Floats score = load(scores + at);
      Floats weight = exp2(multiply_add(score, by, below));
      if (masked) weight = visibility.of(b, t, first + at) ? weight : Floats{};
      weight = T::rounded(weight);
      Floats d_score = weight * (load(d_weights + at) - means);
      if (capped) d_score *= scaling.slope(score);
      T::store(weight, weights + at);
      T::store(d_score, d_scores + at);
    }
  }

  // The columns of a tile as rows of a left operand: the tile itself, or pairs of its neighbouring rows.
  static const Word* columns_of(Buffer<Word>& rows, Buffer<Word>& pairs) {
    if constexpr (T::kNumbers == 1) return rows.get();
    const auto* numbers = reinterpret_cast<const Number*>(rows.get());
    for (int64_t p = 0; p < kTerms; ++p)
      for (int64_t at = 0; at < kBlock; at += kLanes) {
        const Number* even = numbers + 2 * p * kBlock + at;
        const Integers both = lanes_of(even, 0, kLanes) | lanes_of(even + kBlock, 0, kLanes) << 16;
        std::memcpy(pairs.get() + p * kBlock + at, &both, sizeof both);
      }
    return pairs.get();
  }

  // Adds d_scores keys to dq of block i, after all earlier keys; its own keys come last.
  void add_to_dq(int64_t b, int64_t n, int64_t i, int64_t j, const Word* d_scores, const Word* key_rows) const {
    std::atomic<int64_t>& turn = turns[head(b, n) * s.blocks() + i];
    for (int64_t tries = 0; turn.load(std::memory_order_acquire) != j; ++tries) {
      if (tries < 4096)
        pause();
      else
        std::this_thread::yield();
    }
    float* to = sums_of(b, n, i);
    if (d_scores != nullptr)
      block_product<T, Start::kSum>({d_scores, kTerms, 1}, key_rows, width(), kTerms, width(), to, width());
    const float scale = scaling.scale;
    if (i == j) write_rows(to, Head<Element>::of(dq, s, s.n, b, n), i, [scale](int64_t) { return scale; });
    turn.store(j + 1, std::memory_order_release);
  }
};

// ---- handlers

Sizes sizes_of(const ffi::AnyBuffer& q, const ffi::AnyBuffer& k) {
  const auto of_q = q.dimensions();
  return {of_q[0], of_q[1], of_q[2], k.dimensions()[2], of_q[3]};
}

ffi::Error too_small() { return ffi::Error::InvalidArgument("there is not enough room for the packed operands"); }

using Integer32 = ffi::Buffer<ffi::S32>;
using Float32 = ffi::Result<ffi::Buffer<ffi::F32>>;
using Packed = ffi::Result<ffi::Buffer<ffi::U32>>;

// texts: [B, T], [3, B, T], or [0, 0] if each row is one text; window: [], 0 if there is none. The Python side ensures
// that shapes and dtypes agree. Packed arrays are results, so XLA accounts for them.
ffi::Error forward(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v, Integer32 texts,
                   Integer32 window, double scale, double cap, ffi::Result<ffi::AnyBuffer> out, Float32 lse,
                   Packed key_columns, Packed value_rows) {
  const Sizes s = sizes_of(q, k);
  const Visibility visibility(s, *window.typed_data(), Texts::of(texts));
  const Scaling scaling{static_cast<float>(scale), static_cast<float>(cap)};
  return with_element(q, [&](auto example) {
    using Element = decltype(example);
    using Word = typename Terms<Element>::Word;
    const Forward<Element> task{s, visibility, scaling, data_of<Element>(q), data_of<Element>(k), data_of<Element>(v),
                                data_of<Element>(out), lse->typed_data(),
                                reinterpret_cast<Word*>(key_columns->typed_data()),
                                reinterpret_cast<Word*>(value_rows->typed_data())};
    if (static_cast<int64_t>(key_columns->element_count()) < task.packed(s.b, 0, 0)) return too_small();
    in_parallel(pool, s.b * s.k * s.blocks(), [&](int64_t part) { task.pack(part); });
    in_parallel(pool, s.b * s.n * s.blocks(), [&](int64_t part) { task.block(part); });
    return ffi::Error::Success();
  });
}

ffi::Error backward(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v, Integer32 texts,
                    Integer32 window, double scale, double cap, ffi::AnyBuffer out, ffi::Buffer<ffi::F32> lse,
                    ffi::AnyBuffer d_out, ffi::Result<ffi::AnyBuffer> dq, ffi::Result<ffi::AnyBuffer> dk,
                    ffi::Result<ffi::AnyBuffer> dv, Float32 mean, Float32 sums, Packed query_rows, Packed d_out_rows) {
  const Sizes s = sizes_of(q, k);
  const Visibility visibility(s, *window.typed_data(), Texts::of(texts));
  const Scaling scaling{static_cast<float>(scale), static_cast<float>(cap)};
  const auto turns = std::make_unique<std::atomic<int64_t>[]>(s.b * s.n * s.blocks());
  return with_element(q, [&](auto example) {
    using Element = decltype(example);
    using Word = typename Terms<Element>::Word;
    const Backward<Element> task{s, visibility, scaling, data_of<Element>(q), data_of<Element>(k),
                                 data_of<Element>(v), data_of<Element>(out), data_of<Element>(d_out),
                                 data_of<Element>(dq), data_of<Element>(dk), data_of<Element>(dv), lse.typed_data(),
                                 mean->typed_data(), sums->typed_data(),
                                 reinterpret_cast<Word*>(query_rows->typed_data()),
                                 reinterpret_cast<Word*>(d_out_rows->typed_data()), turns.get()};
    if (static_cast<int64_t>(query_rows->element_count()) < task.packed(s.b, 0, 0)) return too_small();
    in_parallel(pool, s.b * s.n * s.blocks(), [&](int64_t part) { task.prepare(part); });
    in_parallel(pool, s.b * s.k * s.blocks(), [&](int64_t part) { task.block(part); });
    return ffi::Error::Success();
  });
}

}  // namespace
}  // namespace qlora

#define ATTENTION_OPERANDS    \
  Ctx<ffi::ThreadPool>()      \
      .Arg<ffi::AnyBuffer>()  \
      .Arg<ffi::AnyBuffer>()  \
      .Arg<ffi::AnyBuffer>()  \
      .Arg<qlora::Integer32>() \
      .Arg<qlora::Integer32>() \
      .Attr<double>("scale")  \
      .Attr<double>("cap")

QLORA_HANDLER(attention_forward, qlora::forward,
              ffi::Ffi::Bind()
                  .ATTENTION_OPERANDS.Ret<ffi::AnyBuffer>()
                  .Ret<ffi::Buffer<ffi::F32>>()
                  .Ret<ffi::Buffer<ffi::U32>>()
                  .Ret<ffi::Buffer<ffi::U32>>());
QLORA_HANDLER(attention_backward, qlora::backward,
              ffi::Ffi::Bind()
                  .ATTENTION_OPERANDS.Arg<ffi::AnyBuffer>()
                  .Arg<ffi::Buffer<ffi::F32>>()
                  .Arg<ffi::AnyBuffer>()
                  .Ret<ffi::AnyBuffer>()
                  .Ret<ffi::AnyBuffer>()
                  .Ret<ffi::AnyBuffer>()
                  .Ret<ffi::Buffer<ffi::F32>>()
                  .Ret<ffi::Buffer<ffi::F32>>()
                  .Ret<ffi::Buffer<ffi::U32>>()
                  .Ret<ffi::Buffer<ffi::U32>>());
