// Parallel work on the thread pool that XLA passes to a handler.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>

#include "xla/ffi/api/ffi.h"

namespace qlora {

// Calls part(0), ..., part(parts - 1) once each, started in this order, on the pool's threads and on the calling one,
// and returns when all are done. The calling thread runs parts too, so it never waits for a part that has not started.
template <typename Part>
void in_parallel(xla::ffi::ThreadPool& pool, int64_t parts, const Part& part) {
  struct State {
    std::atomic<int64_t> next{0}, done{0};
  };
  auto state = std::make_shared<State>();
  // `part` is called only for indices below `parts`, and all these calls end before this function returns.
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
