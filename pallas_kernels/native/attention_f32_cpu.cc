// Causal f32 attention on CPUs with AVX-512: one XLA FFI handler.
//
//   attention_forward_f32:  out = softmax(scale q k^T over visible keys) v, and the log2-sum-exp2 of each query's scores
//
// Tiles of 64 queries by 64 or 128 keys, whose scores stay in a core's caches, as in attention_cpu.cc. All sums and
// products are f32. Keys are packed first as columns, values as rows, per block.

#if defined(__AVX512F__)

#include <cmath>
#include <cstring>

#include "attention.h"
#include "buffer.h"
#include "parallel.h"

namespace ffi = xla::ffi;
using namespace qlora;

namespace {

using Head = qlora::Head<const float>;

// ---- products

// c[R, 16 C] (+)= a[R, terms] b[terms, 16 C]; with Start::kFaded, rows of c are first multiplied by fade[r].
template <int R, int C, Start S>
inline void product(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t terms, float* c,
                    int64_t c_stride, const float* fade) {
  __m512 sums[R][C];
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < C; ++j) {
      if constexpr (S == Start::kZero) sums[r][j] = _mm512_setzero_ps();
      if constexpr (S == Start::kFaded)
        sums[r][j] = _mm512_mul_ps(_mm512_loadu_ps(c + r * c_stride + 16 * j), _mm512_set1_ps(fade[r]));
    }
  for (int64_t p = 0; p < terms; ++p) {
    __m512 columns[C];
    for (int j = 0; j < C; ++j) columns[j] = _mm512_loadu_ps(b + p * b_stride + 16 * j);
    for (int r = 0; r < R; ++r) {
      const __m512 row = _mm512_set1_ps(a[r * a_stride + p]);
      for (int j = 0; j < C; ++j) sums[r][j] = _mm512_fmadd_ps(row, columns[j], sums[r][j]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < C; ++j) _mm512_storeu_ps(c + r * c_stride + 16 * j, sums[r][j]);
}

// The same for 64 rows and any multiple of 16 columns.
template <Start S>
void block_product(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t terms, int64_t columns,
                   float* c, int64_t c_stride, const float* fade = nullptr) {
  for (int64_t j = 0; j < columns; j += kBlock)
    for (int64_t r = 0; r < kBlock; r += kRows) {
      const float *rows = a + r * a_stride, *fades = S == Start::kFaded ? fade + r : nullptr;
      float* to = c + r * c_stride + j;
      switch (std::min<int64_t>(columns - j, kBlock) / 16) {
        case 4: product<kRows, 4, S>(rows, a_stride, b + j, b_stride, terms, to, c_stride, fades); break;
        case 3: product<kRows, 3, S>(rows, a_stride, b + j, b_stride, terms, to, c_stride, fades); break;
        case 2: product<kRows, 2, S>(rows, a_stride, b + j, b_stride, terms, to, c_stride, fades); break;
        default: product<kRows, 1, S>(rows, a_stride, b + j, b_stride, terms, to, c_stride, fades);
      }
    }
}

// ---- packing, with zeros in partial blocks

// to[64, h].
void pack_rows(const Head& head, int64_t block, float* to) {
  const int64_t there = head.rows_of(block);
  if (there < kBlock) std::memset(to, 0, kBlock * head.width * sizeof(float));
  for (int64_t r = 0; r < there; ++r)
    std::memcpy(to + r * head.width, head.row(block * kBlock + r), head.width * sizeof(float));
}

// to[h, 64].
void pack_columns(const Head& head, int64_t block, float* to) {
  const int64_t there = head.rows_of(block);
  if (there < kBlock) std::memset(to, 0, kBlock * head.width * sizeof(float));
  for (int64_t r = 0; r < there; ++r) {
    const float* row = head.row(block * kBlock + r);
    for (int64_t h = 0; h < head.width; ++h) to[h * kBlock + r] = row[h];
  }
}

// ---- forward

struct Forward {
  Sizes s;
  const Visibility& visibility;
  float to_log2;  // converts a product to the log2 of a weight
  const float *q, *k, *v;
  float *out, *lse;                  // lse [B, N, T]
  float *key_columns, *value_rows;  // packed, [B, K, blocks, h, 64] and [B, K, blocks, 64, h]

  int64_t packed(int64_t b, int64_t kv_head, int64_t block) const {
    return ((b * s.k + kv_head) * s.blocks() + block) * kBlock * s.h;
  }

  void pack(int64_t part) const {
    const int64_t block = part % s.blocks(), kv_head = part / s.blocks() % s.k, b = part / s.blocks() / s.k;
    pack_columns(Head::of(k, s, s.k, b, kv_head), block, key_columns + packed(b, kv_head, block));
    pack_rows(Head::of(v, s, s.k, b, kv_head), block, value_rows + packed(b, kv_head, block));
  }

  // Scratch of a block of queries: sums [64, h], scores [64, 128], four numbers per query.
  struct Scratch {
    Buffer<float> queries, sums, scores, of_rows;
    float *top, *total, *added, *fade;
    explicit Scratch(int64_t h)
        : queries(kBlock * h), sums(kBlock * h), scores(kBlock * kMostKeys), of_rows(4 * kBlock), top(of_rows.get()),
          total(top + kBlock), added(total + kBlock), fade(added + kBlock) {
      std::fill_n(top, kBlock, kMasked);
      std::fill_n(total, kBlock, 0.0f);
      std::fill_n(sums.get(), kBlock * h, 0.0f);
    }
  };

  // Computes one block of queries of one head, the longest first.
  void block(int64_t part) const {
    const int64_t heads = s.b * s.n, i = s.blocks() - 1 - part / heads;
    const int64_t b = part % heads / s.n, n = part % heads % s.n, kv_head = n / s.groups();
    Scratch scratch(s.h);
    pack_rows(Head::of(q, s, s.n, b, n), i, scratch.queries.get());
    for (int64_t j = visibility.first_keys(i), next; j <= i; j = next) {
      if (visibility.nothing(b, i, j)) {
        next = j + 1;
        continue;
      }
      next = std::min(j + 2, i + 1);
      if (next == j + 2 && visibility.nothing(b, i, j + 1)) --next;
      tile(b, i, j, next, packed(b, kv_head, j), scratch);
    }
    for (int64_t r = 0; r < std::min(kBlock, s.t - i * kBlock); ++r) {
      const int64_t t = i * kBlock + r;
      const __m512 by = _mm512_set1_ps(1.0f / scratch.total[r]);
      for (int64_t h = 0; h < s.h; h += 16) {
        const __m512 sum = _mm512_loadu_ps(scratch.sums.get() + r * s.h + h);
        _mm512_storeu_ps(out + ((b * s.t + t) * s.n + n) * s.h + h, _mm512_mul_ps(sum, by));
      }
      lse[(b * s.n + n) * s.t + t] = scratch.top[r] * to_log2 + std::log2(scratch.total[r]);
    }
  }

  // Adds the contribution of the keys of blocks [j, next), which are packed at `first`.
  void tile(int64_t b, int64_t i, int64_t j, int64_t next, int64_t first, Scratch& scratch) const {
    const int64_t keys = (next - j) * kBlock;
    for (int64_t each = 0; each < next - j; ++each)
      block_product<Start::kZero>(scratch.queries.get(), s.h, key_columns + first + each * kBlock * s.h, kBlock, s.h,
                                  kBlock, scratch.scores.get() + each * kBlock, kMostKeys);
    const bool masked = !visibility.everything(b, i, j) || !visibility.everything(b, i, next - 1);
    for (int64_t r = 0; r < kBlock; ++r) row(b, i * kBlock + r, j * kBlock, keys, masked, r, scratch);
    for (int64_t r = 0; r < kBlock; r += 16) {
      const __m512 fades = exp2(_mm512_loadu_ps(scratch.fade + r));
      _mm512_storeu_ps(scratch.fade + r, fades);
      const __m512 both =
          _mm512_fmadd_ps(_mm512_loadu_ps(scratch.total + r), fades, _mm512_loadu_ps(scratch.added + r));
      _mm512_storeu_ps(scratch.total + r, both);
    }
    block_product<Start::kFaded>(scratch.scores.get(), kMostKeys, value_rows + first, s.h, keys, s.h,
                                 scratch.sums.get(), s.h, scratch.fade);
  }

  // Converts one query's scores of `keys` keys to weights 2^(score - top), in place, and stores their sum, the new top
  // and the log2 of the factor for earlier sums. Masked keys weigh 2^0 while no key has been seen: the query's own key,
  // in the last tile, fades that to 0.
  void row(int64_t b, int64_t t, int64_t first, int64_t keys, bool masked, int64_t r, Scratch& scratch) const {
    float* scores = scratch.scores.get() + r * kMostKeys;
    __m512 most = _mm512_set1_ps(scratch.top[r]);
    for (int64_t at = 0; at < keys; at += 16) {
      __m512 x = _mm512_loadu_ps(scores + at);
      if (masked) {
        x = _mm512_mask_blend_ps(visibility.of(b, t, first + at), _mm512_set1_ps(kMasked), x);
        _mm512_storeu_ps(scores + at, x);
      }
      most = _mm512_max_ps(most, x);
    }
    const float now = _mm512_reduce_max_ps(most);
    const __m512 above = _mm512_set1_ps(now), by = _mm512_set1_ps(to_log2);
    __m512 sum = _mm512_setzero_ps();
    for (int64_t at = 0; at < keys; at += 16) {
      const __m512 weights = exp2(_mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(scores + at), above), by));
      _mm512_storeu_ps(scores + at, weights);
      sum = _mm512_add_ps(sum, weights);
    }
    scratch.added[r] = _mm512_reduce_add_ps(sum);
    scratch.fade[r] = (scratch.top[r] - now) * to_log2;
    scratch.top[r] = now;
  }
};

using Numbers = ffi::Buffer<ffi::F32>;

// texts: [B, T], [3, B, T], or [0, 0] if each row is one text. The Python side ensures that shapes agree and that H is a
// multiple of 16. Packed arrays are results, so XLA accounts for them.
ffi::Error forward(ffi::ThreadPool pool, Numbers q, Numbers k, Numbers v, ffi::Buffer<ffi::S32> texts, double scale,
                   int64_t window, ffi::Result<Numbers> out, ffi::Result<Numbers> lse,
                   ffi::Result<Numbers> key_columns, ffi::Result<Numbers> value_rows) {
  const auto of_q = q.dimensions();
  const Sizes s{of_q[0], of_q[1], of_q[2], k.dimensions()[2], of_q[3]};
  const Visibility visibility(s, window, Texts::of(texts));
  const Forward task{s, visibility, static_cast<float>(scale * kLog2E), q.typed_data(), k.typed_data(), v.typed_data(),
                     out->typed_data(), lse->typed_data(), key_columns->typed_data(), value_rows->typed_data()};
  qlora::in_parallel(pool, s.b * s.k * s.blocks(), [&](int64_t part) { task.pack(part); });
  qlora::in_parallel(pool, s.b * s.n * s.blocks(), [&](int64_t part) { task.block(part); });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(attention_forward_f32, forward,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Numbers>()
                                  .Arg<Numbers>()
                                  .Arg<Numbers>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Attr<double>("scale")
                                  .Attr<int64_t>("window")
                                  .Ret<Numbers>()
                                  .Ret<Numbers>()
                                  .Ret<Numbers>()
                                  .Ret<Numbers>());

#endif  // AVX-512
