// Memory that is freed at the end of a scope.

#pragma once

#include <cstdint>
#include <cstdlib>

namespace qlora {

// An array aligned to a cache line, freed at the end of its scope.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t count) : at_(static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64))) {
    if (at_ == nullptr) std::abort();
  }
  ~Buffer() { std::free(at_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* get() { return at_; }

 private:
  T* at_;
};

}  // namespace qlora
