// What handlers share: their registration, parallel work on XLA's threads, scratch memory, and operands as f32.

#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "lanes.h"
#include "xla/ffi/api/ffi.h"

// Defines a handler, one of the few symbols of the library that can be seen from outside.
#define QLORA_HANDLER(name, function, ...)                                                        \
  extern "C" __attribute__((visibility("default"))) XLA_FFI_Error* name(XLA_FFI_CallFrame*); \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(name, function, __VA_ARGS__)

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
  while (state->done.load(std::memory_order_acquire) < parts) pause();
}

// Bytes between what a loop multiplies and what it prefetches, some hundred nanoseconds of work. Processors prefetch
// streams by themselves, but not beyond a page, and a row of codes has less than one.
constexpr int64_t kBytesAhead = 2048;

// An array aligned to a cache line, freed at the end of its scope.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t count) : at_(static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64))) {
    if (at_ == nullptr) std::abort();
  }
  ~Buffer() { std::free(at_); }
  Buffer(Buffer&& other) noexcept : at_(std::exchange(other.at_, nullptr)) {}
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* get() const { return at_; }

 private:
  T* at_;
};

// The values of an f32 or bf16 buffer, as f32.
inline Buffer<float> in_f32(const xla::ffi::AnyBuffer& x) {
  const int64_t count = x.element_count();
  Buffer<float> out(count);
  const uint16_t* from = reinterpret_cast<const uint16_t*>(x.untyped_data());
  if (x.element_type() == xla::ffi::F32) {
    std::memcpy(out.get(), x.untyped_data(), count * sizeof(float));
    return out;
  }
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(load(from + i), out.get() + i);
  for (; i < count; ++i) out.get()[i] = number(from[i]);
  return out;
}

}  // namespace qlora
