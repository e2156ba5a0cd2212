// Zeros that take no memory until they are written: one XLA FFI handler.
//
//   lazy_zeros:  y = 0

#include "handler.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace ffi = xla::ffi;

namespace qlora {
namespace {

constexpr uintptr_t kUnit = 2 << 20;  // a huge page

ffi::Error lazy_zeros(ffi::Result<ffi::AnyBuffer> y) {
  char* const begin = static_cast<char*>(y->untyped_data());
  char* const end = begin + y->size_bytes();
#ifdef __linux__
  // Linux takes these pages back, and gives a page of zeros at the next access. On other systems they keep their bytes.
  char* const first = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(begin) + kUnit - 1) / kUnit * kUnit);
  char* const last = reinterpret_cast<char*>(reinterpret_cast<uintptr_t>(end) / kUnit * kUnit);
  if (first < last && madvise(first, last - first, MADV_DONTNEED) == 0) {
    std::memset(begin, 0, first - begin);
    std::memset(last, 0, end - last);
    return ffi::Error::Success();
  }
#endif
  std::memset(begin, 0, end - begin);
  return ffi::Error::Success();
}

}  // namespace
}  // namespace qlora

QLORA_HANDLER(lazy_zeros, qlora::lazy_zeros, ffi::Ffi::Bind().Ret<ffi::AnyBuffer>());
