// Work shared out among the threads that XLA lends to a handler.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>

#include "xla/ffi/api/ffi.h"

namespace qlora {

// Calls part(0), ..., part(parts - 1), each once, begun in this order, on the threads of the pool and on this one, and
// returns when all are done. This thread takes parts like any other: it never waits for a part that nobody has begun.
template <typename Part>
void in_parallel(xla::ffi::ThreadPool& pool, int64_t parts, const Part& part) {
  struct State {
    std::atomic<int64_t> next{0}, done{0};
  };
  auto state = std::make_shared<State>();
  // `part` is used only for parts below `parts`, all of which end before this function does.
  auto work = [state, parts, &part] {
    for (int64_t i; (i = state->next.fetch_add(1)) < parts;) {
      part(i);
      state->done.fetch_add(1, std::memory_order_release);
    }
  };
  for (int64_t i = 1; i < std::min<int64_t>(parts, pool.num_threads()); ++i) pool.Schedule([work] { work(); });
  work();
  while (state->done.load(std::memory_order_acquire) < parts) _mm_pause();
}

}  // namespace qlora
