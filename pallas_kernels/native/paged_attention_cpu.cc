// Attention over the pages of a key-value cache: one XLA FFI handler.
//
//   attention_paged:  out = softmax(scores, over visible positions) v, of one layer. Each query has a row of the cache
//                     and a position in it; it sees the row's positions up to that one. A query without a position (-1)
//                     gets zeros
//
// A page holds S positions of one layer, in f32, bf16, or 8-bit codes with a factor per position and key head. Scores and
// sums are f32. If queries and pages are bf16, weights are rounded to bf16, too; otherwise all numbers are converted to
// f32. pallas_kernels/attention/reference.py defines the result.
//
// A query's result depends only on its keys and values, to the bit: neither on other queries nor on page numbers.
// Decoding has one query per row, which is computed by itself. Other calls are cut into blocks of up to 64 queries with
// consecutive positions of one row, and computed in tiles as in attention_cpu.cc. Tiles begin at multiples of 128
// positions, and keys that a query does not see leave its sums as they are.

#include <cmath>

#include "attention.h"
#include "handler.h"
#include "product.h"

namespace ffi = xla::ffi;

namespace qlora {
namespace {

// ---- pages

// The numbers of a page, as f32: codes are multiplied by a factor.
inline Floats numbers(const float* at, float) { return load(at); }
inline Floats numbers(const uint16_t* at, float) { return load(at); }
inline Floats numbers(const int8_t* at, float factor) { return load(at) * factor; }
inline float one_number(float x, float) { return x; }
inline float one_number(uint16_t x, float) { return number(x); }
inline float one_number(int8_t x, float factor) { return static_cast<float>(x) * factor; }

inline void copy_numbers(const uint16_t* from, float, int64_t width, uint16_t* to) {
  std::memcpy(to, from, width * sizeof *to);
}
template <typename Stored>
void copy_numbers(const Stored* from, float factor, int64_t width, float* to) {
  int64_t h = 0;
  for (; h + kLanes <= width; h += kLanes) store(numbers(from + h, factor), to + h);
  for (; h < width; ++h) to[h] = one_number(from[h], factor);
}

// Keys or values of all pages, [pages, K, S, H]. An index is that of a position of a page's key head.
template <typename Stored>
struct Pages {
  const Stored* at;
  const float* factors;  // [pages, K, S], of codes
  int64_t width;

  const Stored* row(int64_t index) const { return at + index * width; }
  float factor(int64_t index) const { return std::is_same_v<Stored, int8_t> ? factors[index] : 1.0f; }
};

template <typename Stored>
struct Cache {
  Pages<Stored> k, v;
  const int32_t* table;  // [rows, I]: the page of each S positions of a row, of one layer
  int64_t pages, kv_heads, slots, rows, blocks;

  int64_t positions() const { return blocks * slots; }

  // Calls run(at, end, index) for neighbours [at, end) among the positions [first, end) of a row; index is that of `at`.
  template <typename Run>
  void neighbours(int64_t row, int64_t kv_head, int64_t first, int64_t end, const Run& run) const {
    const int32_t* pages_of_row = table + std::clamp<int64_t>(row, 0, rows - 1) * blocks;
    for (int64_t at = first, next; at < end; at = next) {
      const int64_t block = at / slots, page = std::clamp<int64_t>(pages_of_row[block], 0, pages - 1);
      next = std::min(end, (block + 1) * slots);
      run(at, next, (page * kv_heads + kv_head) * slots + at - block * slots);
    }
  }
};

struct Call {
  Sizes s;  // b: 1; t: queries
  int64_t window;
  Scaling scaling;
  const float* sinks;                // [N], or nullptr
  const int32_t *rows, *positions;   // of each query
  float* out;                        // [T, N, H]

  int64_t first_seen(int64_t position) const { return window > 0 ? std::max<int64_t>(0, position - window + 1) : 0; }
  // The part of a sink in the sum of weights whose greatest score has this log2.
  float of_sink(int64_t head, float log2_of_top) const {
    return sinks == nullptr ? 0.0f : std::exp2(sinks[head] * static_cast<float>(kLog2E) - log2_of_top);
  }
};

// ---- decoding

template <typename Element, typename Stored>
struct Decode {
  Call call;
  Cache<Stored> cache;
  const float* q;  // [T, N, H]

  // Computes one head of one query.
  void query(int64_t part) const {
    const int64_t n = part % call.s.n, t = part / call.s.n, width = call.s.h;
    float* to = out(part);
    std::fill_n(to, width, 0.0f);
    if (call.positions[t] < 0) return;
    const int64_t last = std::min<int64_t>(call.positions[t], cache.positions() - 1);
    const int64_t first = call.first_seen(last), count = last + 1 - first;
    Buffer<float> weights(count + kLanes);
    const auto over_seen = [&](const auto& run) {
      cache.neighbours(call.rows[t], n / call.s.groups(), first, last + 1, run);
    };
    over_seen([&](int64_t at, int64_t end, int64_t index) {
      for (; at < end; ++at, ++index) weights.get()[at - first] = dot(q + part * width, index);
    });
    softmax(weights.get(), count, n);
    int64_t h = 0;
    for (; h + 4 * kLanes <= width; h += 4 * kLanes) values<4>(over_seen, weights.get(), first, to, h);
    for (; h + kLanes <= width; h += kLanes) values<1>(over_seen, weights.get(), first, to, h);
    over_seen([&](int64_t at, int64_t end, int64_t index) {
      for (; at < end && h < width; ++at, ++index)
        for (int64_t i = h; i < width; ++i)
          to[i] += weights.get()[at - first] * one_number(cache.v.row(index)[i], cache.v.factor(index));
    });
  }

 private:
  float* out(int64_t part) const { return call.out + part * call.s.h; }

  float dot(const float* x, int64_t index) const {
    const Stored* y = cache.k.row(index);
    const float factor = cache.k.factor(index);
    Floats products{};
    int64_t h = 0;
    for (; h + kLanes <= call.s.h; h += kLanes) products = multiply_add(load(x + h), numbers(y + h, factor), products);
    float whole = sum(products);
    for (; h < call.s.h; ++h) whole += x[h] * one_number(y[h], factor);
    return whole;
  }

  // Replaces products by weights, rounded to the numbers' dtype. A sink takes part in their sum.
  void softmax(float* x, int64_t count, int64_t head) const {
    const Scaling& scaling = call.scaling;
    std::fill_n(x + count, kLanes, kMasked);
    Floats most = all(kMasked);
    for (int64_t i = 0; i < count; i += kLanes) {
      Floats scores = load(x + i);
      if (scaling.cap > 0) scores = scaling.cap * tanh(scores * (scaling.scale / scaling.cap));
      if (i + kLanes > count) scores = lane_numbers() < static_cast<int32_t>(count - i) ? scores : all(kMasked);
      store(scores, x + i);
      most = max(most, scores);
    }
    const float of_keys = greatest(most) * scaling.to_log2();
    const float top = call.sinks == nullptr
                          ? of_keys : std::max(of_keys, call.sinks[head] * static_cast<float>(kLog2E));
    const Floats by = all(scaling.to_log2()), below = all(-top);
    Floats total{};
    for (int64_t i = 0; i < count; i += kLanes) {
      const Floats powers = exp2(multiply_add(load(x + i), by, below));
      store(powers, x + i);
      total += powers;
    }
    const float factor = 1.0f / (sum(total) + call.of_sink(head, top));
    for (int64_t i = 0; i < count; i += kLanes) store(Singles<Element>::rounded(load(x + i) * factor), x + i);
  }

  // Sums C vectors of features of values from h on.
  template <int C, typename OverSeen>
  void values(const OverSeen& over_seen, const float* weights, int64_t first, float* to, int64_t h) const {
    Floats totals[C] = {};
    over_seen([&](int64_t at, int64_t end, int64_t index) {
      Floats sums[C];
      std::memcpy(sums, totals, sizeof sums);
      for (; at < end; ++at, ++index) {
        const Floats weight = all(weights[at - first]);
        const float factor = cache.v.factor(index);
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c)
          sums[c] = multiply_add(weight, numbers(cache.v.row(index) + h + c * kLanes, factor), sums[c]);
      }
      std::memcpy(totals, sums, sizeof sums);
    });
    std::memcpy(to + h, totals, sizeof totals);
  }
};

// ---- blocks of queries

// Queries with consecutive positions of one row, from a token and its position on.
struct Block {
  int64_t token, count, row, position;

  int64_t last() const { return position + count - 1; }
};

std::vector<Block> blocks_of(const Call& call) {
  std::vector<Block> blocks;
  for (int64_t t = 0; t < call.s.t; ++t) {
    const int64_t row = call.rows[t], position = call.positions[t];
    if (position < 0) {
      std::fill_n(call.out + t * call.s.n * call.s.h, call.s.n * call.s.h, 0.0f);
      continue;
    }
    if (!blocks.empty()) {
      Block& open = blocks.back();
      if (open.token + open.count == t && open.row == row && open.last() + 1 == position && open.count < kBlock) {
        ++open.count;
        continue;
      }
    }
    blocks.push_back({t, 1, row, position});
  }
  return blocks;
}

constexpr int64_t kMostHeads = 4;  // heads that read a tile after it is packed, so that their sums stay in the caches

template <typename Element, typename Stored>
struct Prefill {
  using T = Terms<Element>;
  using Word = typename T::Word;
  using Number = typename T::Number;
  Call call;
  Cache<Stored> cache;
  Element* q;  // [T, N, H]
  std::vector<Block> blocks;

  int64_t width() const { return (call.s.h + kWidth - 1) / kWidth * kWidth; }
  int64_t terms() const { return (call.s.h + T::kNumbers - 1) / T::kNumbers; }
  int64_t parts_of_group() const { return (call.s.groups() + kMostHeads - 1) / kMostHeads; }
  int64_t parts() const { return static_cast<int64_t>(blocks.size()) * call.s.k * parts_of_group(); }

  // Memory of a tile: packed keys and values, scores and weights.
  struct Tile {
    Buffer<Number> rows;
    Buffer<Word> keys, values, weights;
    Buffer<float> scores;
    explicit Tile(int64_t width)
        : rows(kBlock * width), keys(kMostKeys * width), values(kMostKeys * width), weights(kBlock * kMostKeys),
          scores(kBlock * kMostKeys) {
      std::memset(weights.get(), 0, kBlock * kMostKeys * sizeof(Word));
    }
  };

  // Queries of one head: sums of values, and four numbers per query.
  struct Queries {
    Buffer<Word> copy;
    Buffer<float> sums, of_rows;
    float *top, *total, *added, *fade;
    Left<Word> rows;
    explicit Queries(int64_t width)
        : copy(kBlock * width), sums(kBlock * width), of_rows(4 * kBlock), top(of_rows.get()), total(top + kBlock),
          added(total + kBlock), fade(added + kBlock) {
      std::fill_n(of_rows.get(), 4 * kBlock, 0.0f);
      std::fill_n(top, kBlock, kMasked);
      std::fill_n(sums.get(), kBlock * width, 0.0f);
    }
  };

  template <typename Any>
  Head<Any> head_of(Any* data, const Block& block, int64_t n) const {
    return {data + (block.token * call.s.n + n) * call.s.h, call.s.n * call.s.h, block.count, call.s.h};
  }

  // Computes a block of queries of some heads that share a key head; the last blocks, which see most, come first.
  void part(int64_t index) const {
    const int64_t heads = call.s.k * parts_of_group(), groups = call.s.groups();
    const Block& block = blocks[blocks.size() - 1 - index / heads];
    const int64_t kv_head = index % heads / parts_of_group(), skipped = index % parts_of_group() * kMostHeads;
    const int64_t first = kv_head * groups + skipped, count = std::min(kMostHeads, groups - skipped);
    Tile tile(width());
    std::vector<Queries> queries;
    for (int64_t i = 0; i < count; ++i) {
      queries.emplace_back(width());
      queries[i].rows = rows_of(head_of(q, block, first + i), 0, queries[i].copy.get());
    }
    const int64_t end = std::min(block.last() + 1, cache.positions());
    for (int64_t at = call.first_seen(block.position) / kMostKeys * kMostKeys; at < end; at += kMostKeys) {
      const int64_t keys = end - at > kBlock ? kMostKeys : kBlock;
      pack(cache.k, block.row, kv_head, at, keys, end, tile, tile.keys.get(), true);
      pack(cache.v, block.row, kv_head, at, keys, end, tile, tile.values.get(), false);
      for (Queries& each : queries) add(block, at, keys, tile, each);
    }
    for (int64_t i = 0; i < count; ++i) {
      const float *top = queries[i].top, *total = queries[i].total;
      write_rows(queries[i].sums.get(), head_of(call.out, block, first + i), 0, [&](int64_t r) {
        return 1.0f / (total[r] + call.of_sink(first + i, top[r] * call.scaling.to_log2()));
      });
    }
  }

  // Packs the positions [at, at + keys) as the columns or the rows of a right operand; those from `end` on are zeros.
  void pack(const Pages<Stored>& from, int64_t row, int64_t kv_head, int64_t at, int64_t keys, int64_t end, Tile& tile,
            Word* to, bool columns) const {
    Number* rows = tile.rows.get();
    for (int64_t first = at; first < at + keys; first += kBlock, to += kBlock * width() / T::kNumbers) {
      std::memset(rows, 0, kBlock * width() * sizeof *rows);
      cache.neighbours(row, kv_head, first, std::min(end, first + kBlock), [&](int64_t each, int64_t next, int64_t index) {
        for (; each < next; ++each, ++index)
          copy_numbers(from.row(index), from.factor(index), call.s.h, rows + (each - first) * width());
      });
      if (columns)
        pack_transposed(reinterpret_cast<const Word*>(rows), width() / T::kNumbers, kBlock, terms(), to, kBlock);
      else
        pack_rows(Head<Number>{rows, width(), kBlock, width()}, 0, to);
    }
  }

  // Adds the contribution of a tile to the queries of a head.
  void add(const Block& block, int64_t at, int64_t keys, Tile& tile, Queries& queries) const {
    for (int64_t i = 0; i < keys; i += kBlock)
      block_product<T, Start::kZero>(queries.rows, tile.keys.get() + i * width() / T::kNumbers, kBlock, terms(), kBlock,
                                     tile.scores.get() + i, kMostKeys, nullptr, block.count);
    call.scaling.apply(tile.scores.get(), kMostKeys, keys);
    const bool masked = at + keys - 1 > block.position || at < call.first_seen(block.last());
    for (int64_t r = 0; r < block.count; ++r) row(block.position + r, at, keys, masked, r, tile, queries);
    for (int64_t r = 0; r < kBlock; r += kLanes) {
      // exp2(0) is not 1: a tile that a query does not see, or that has no greater score, must not change its sums.
      const Floats log2 = load(queries.fade + r), fades = log2 == 0.0f ? all(1.0f) : exp2(log2);
      store(fades, queries.fade + r);
      store(multiply_add(load(queries.total + r), fades, load(queries.added + r)), queries.total + r);
    }
    const Left<Word> weights{tile.weights.get(), kMostKeys / T::kNumbers, 1};
    block_product<T, Start::kFaded>(weights, tile.values.get(), width(), keys / T::kNumbers, width(),
                                    queries.sums.get(), width(), queries.fade, block.count);
  }

  // Converts the scores of the query at a position to weights, as in attention_cpu.cc, but all are 0 until it sees a key.
  void row(int64_t position, int64_t at, int64_t keys, bool masked, int64_t r, Tile& tile, Queries& queries) const {
    float* scores = tile.scores.get() + r * kMostKeys;
    Word* words = tile.weights.get() + r * kMostKeys / T::kNumbers;
    Floats most = all(queries.top[r]);
    for (int64_t i = 0; i < keys; i += kLanes) {
      if (masked) store(seen(position, at + i) ? load(scores + i) : all(kMasked), scores + i);
      most = max(most, load(scores + i));
    }
    const float now = greatest(most);
    queries.fade[r] = (queries.top[r] - now) * call.scaling.to_log2();
    queries.top[r] = now;
    queries.added[r] = now == kMasked ? 0.0f : weigh<T>(scores, keys, now, call.scaling.to_log2(), words);
    if (now == kMasked) std::memset(words, 0, keys / T::kNumbers * sizeof *words);
  }

  Integers seen(int64_t position, int64_t at) const {
    const Integers keys = static_cast<int32_t>(at) + lane_numbers();
    return (keys <= static_cast<int32_t>(position)) & (keys >= static_cast<int32_t>(call.first_seen(position)));
  }
};

// ---- the handler

using Integer32 = ffi::Buffer<ffi::S32>;
using Float32 = ffi::Buffer<ffi::F32>;

// Attends with numbers of a dtype, of queries [B, T, N, H].
template <typename Element, typename Stored>
ffi::Error attend(ffi::ThreadPool& pool, const ffi::AnyBuffer& q, bool decode, const Call& call,
                  const Cache<Stored>& cache) {
  if (decode) {
    const Buffer<float> queries = in_f32(q);
    const Decode<Element, Stored> task{call, cache, queries.get()};
    in_parallel(pool, call.s.t * call.s.n, [&](int64_t part) { task.query(part); });
    return ffi::Error::Success();
  }
  const auto run = [&](Element* queries) {
    const Prefill<Element, Stored> task{call, cache, queries, blocks_of(call)};
    in_parallel(pool, task.parts(), [&](int64_t part) { task.part(part); });
  };
  if constexpr (std::is_same_v<Element, float>)
    run(in_f32(q).get());
  else
    run(data_of<Element>(q));
  return ffi::Error::Success();
}

// k, v: [pages, K, S, H]; k_factors, v_factors: [pages, K, S] if those are codes, else [0]; table: [L, R, I]; rows and
// positions: [B, T]; window: [], 0 if there is none; sinks: [N], or [0].
ffi::Error paged(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v, Float32 k_factors,
                 Float32 v_factors, Integer32 table, Integer32 layer, Integer32 rows, Integer32 positions,
                 Integer32 window, Float32 sinks, double scale, double cap, ffi::Result<Float32> out) {
  const auto of_q = q.dimensions(), of_k = k.dimensions(), of_table = table.dimensions();
  const Call call{{1, of_q[0] * of_q[1], of_q[2], of_k[1], of_q[3]}, *window.typed_data(),
                  {static_cast<float>(scale), static_cast<float>(cap)},
                  sinks.element_count() == 0 ? nullptr : sinks.typed_data(), rows.typed_data(),
                  positions.typed_data(), out->typed_data()};
  const int64_t at = std::clamp<int64_t>(*layer.typed_data(), 0, of_table[0] - 1) * of_table[1] * of_table[2];
  const auto run = [&](auto element, auto stored) {
    using Element = decltype(element);
    using Stored = decltype(stored);
    const Cache<Stored> cache{{data_of<Stored>(k), k_factors.typed_data(), of_k[3]},
                              {data_of<Stored>(v), v_factors.typed_data(), of_k[3]},
                              table.typed_data() + at, of_k[0], of_k[1], of_k[2], of_table[1], of_table[2]};
    return attend<Element>(pool, q, of_q[1] == 1, call, cache);
  };
  if (k.element_type() == ffi::F32) return run(float(), float());
  if (k.element_type() == ffi::S8) return run(float(), int8_t());
  if (k.element_type() != ffi::BF16) return ffi::Error::InvalidArgument("attention has loops for pages of f32, bf16 and s8");
  return q.element_type() == ffi::BF16 ? run(uint16_t(), uint16_t()) : run(float(), uint16_t());
}

}  // namespace
}  // namespace qlora

QLORA_HANDLER(attention_paged, qlora::paged,
              ffi::Ffi::Bind()
                  .Ctx<ffi::ThreadPool>()
                  .Arg<ffi::AnyBuffer>()
                  .Arg<ffi::AnyBuffer>()
                  .Arg<ffi::AnyBuffer>()
                  .Arg<qlora::Float32>()
                  .Arg<qlora::Float32>()
                  .Arg<qlora::Integer32>()
                  .Arg<qlora::Integer32>()
                  .Arg<qlora::Integer32>()
                  .Arg<qlora::Integer32>()
                  .Arg<qlora::Integer32>()
                  .Arg<qlora::Float32>()
                  .Attr<double>("scale")
                  .Attr<double>("cap")
                  .Ret<qlora::Float32>());
