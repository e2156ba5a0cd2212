// Conversions between f32 and the 16-bit types of XLA's buffers.

#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace qlora {

inline void put(float value, float* to) { *to = value; }
inline void put(float value, uint16_t* to) {  // as bf16, rounded to nearest even
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  *to = static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// The values of an f32 or bf16 buffer, as f32.
inline std::vector<float> in_f32(const xla::ffi::AnyBuffer& x) {
  std::vector<float> out(x.element_count());
  if (x.element_type() == xla::ffi::F32) {
    std::memcpy(out.data(), x.untyped_data(), out.size() * sizeof(float));
    return out;
  }
  const uint16_t* from = reinterpret_cast<const uint16_t*>(x.untyped_data());
  for (size_t i = 0; i < out.size(); ++i) {
    const uint32_t bits = static_cast<uint32_t>(from[i]) << 16;
    std::memcpy(&out[i], &bits, 4);
  }
  return out;
}

}  // namespace qlora
