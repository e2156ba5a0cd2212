// AMX's instructions in plain C++, as Intel's manual defines them, for processors without: included before the loops.
//
// Sums of a register are of the even terms and of the odd ones, each from 0 on, and then added to the result; numbers
// below 2^-126 are 0. A thread that has not configured its registers ends the process, as it would on the processor.

#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace software {

struct Shape {
  int rows, bytes;
};
inline thread_local bool configured = false;
inline thread_local Shape shapes[8];
inline thread_local uint8_t registers[8][16][64];

inline void check() {
  if (!configured) std::abort();
}
inline float number(const uint8_t* at) {
  uint16_t half;
  std::memcpy(&half, at, 2);
  const uint32_t bits = (half & 0x7f80) == 0 ? (half & 0x8000u) << 16 : uint32_t(half) << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline float flushed(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }

inline void loadconfig(const void* from) {
  const auto* config = static_cast<const uint8_t*>(from);
  if (config[0] != 1) std::abort();
  for (int i = 0; i < 8; ++i) {
    shapes[i] = {config[48 + i], config[16 + 2 * i]};
    if (shapes[i].rows > 16 || shapes[i].bytes > 64) std::abort();
  }
  std::memset(registers, 0, sizeof registers);
  configured = true;
}
inline void release() { configured = false; }
inline void zero(int i) {
  check();
  std::memset(registers[i], 0, sizeof registers[i]);
}
inline void load(int i, const void* from, int64_t stride) {
  zero(i);
  for (int r = 0; r < shapes[i].rows; ++r)
    std::memcpy(registers[i][r], static_cast<const uint8_t*>(from) + r * stride, shapes[i].bytes);
}
inline void store(int i, void* to, int64_t stride) {
  check();
  for (int r = 0; r < shapes[i].rows; ++r)
    std::memcpy(static_cast<uint8_t*>(to) + r * stride, registers[i][r], shapes[i].bytes);
}
inline void multiply(int c, int a, int b) {
  check();
  if (shapes[a].bytes != 4 * shapes[b].rows || shapes[c].rows != shapes[a].rows) std::abort();
  for (int m = 0; m < shapes[c].rows; ++m)
    for (int n = 0; n < shapes[c].bytes / 4; ++n) {
      float sums[2] = {};
      for (int k = 0; k < shapes[b].rows; ++k)
        for (int half = 0; half < 2; ++half)
          sums[half] = flushed(std::fma(number(registers[a][m] + 4 * k + 2 * half),
                                        number(registers[b][k] + 4 * n + 2 * half), sums[half]));
      float total;
      std::memcpy(&total, registers[c][m] + 4 * n, 4);
      total = flushed(total + flushed(sums[0] + sums[1]));
      std::memcpy(registers[c][m] + 4 * n, &total, 4);
    }
}

}  // namespace software

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadconfig(from) software::loadconfig(from)
#define _tile_release() software::release()
#define _tile_loadd(i, from, stride) software::load(i, from, stride)
#define _tile_stored(i, to, stride) software::store(i, to, stride)
#define _tile_zero(i) software::zero(i)
#define _tile_dpbf16ps(c, a, b) software::multiply(c, a, b)
#define __AMX_BF16__ 1
