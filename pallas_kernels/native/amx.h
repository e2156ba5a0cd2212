// Strips of bf16 rows for AMX: its eight registers hold 16 rows of 64 bytes, and one instruction multiplies two of them.
//
//   c[16, 16] += sum over 16 pairs of a[16 rows, 16 pairs] and b[16 pairs, 16 columns]
//
// Four registers hold 32 x 32 sums, two 32 rows of a, and two 32 columns of b. Panels of b have this form already. A
// strip is packed as [terms / 16, 32, 16], so that a register is 1 KiB in a row; rows and terms past the end are 0.

#pragma once

#include "terms.h"

namespace qlora {

constexpr int64_t kSide = 16;  // rows of a register, and words in each
constexpr int64_t kRegister = kSide * kSide;

template <>
struct Strips<Pairs> {
  static constexpr int64_t kRows = 2 * kSide;
  static constexpr int64_t kMostRows = 1024;
  static constexpr int64_t kMostTerms = 256;  // a panel's chunk takes 32 KiB

  // Gives this thread registers of full size, for as long as it lives.
  class Registers {
   public:
    Registers() {
      alignas(64) uint8_t config[64] = {1};  // the one palette, whose registers have at most 16 rows of 64 bytes
      for (int i = 0; i < 8; ++i) {
        config[16 + 2 * i] = 4 * kSide;
        config[48 + i] = kSide;
      }
      _tile_loadconfig(config);
    }
    ~Registers() { _tile_release(); }
    Registers(const Registers&) = delete;
    Registers& operator=(const Registers&) = delete;
  };

  static int64_t padded(int64_t count, int64_t multiple) { return (count + multiple - 1) / multiple * multiple; }
  static int64_t words(int64_t rows, int64_t terms) { return padded(rows, kRows) * padded(terms, kSide); }
  static int64_t place(int64_t row, int64_t, int64_t start, int64_t terms) {
    return row * padded(terms, kSide) + start * kRows;
  }

  static void pack(const uint16_t* a, int64_t rows, int64_t terms, uint32_t* to) {
    for (int64_t k = 0; k < terms; k += kSide)
      for (int64_t r = 0; r < kRows; ++r, to += kSide) {
        const int64_t count = r < rows ? std::min(kSide, terms - k) : 0;
        std::memcpy(to, a + 2 * (r * terms + k), count * sizeof *to);
        std::memset(to + count, 0, (kSide - count) * sizeof *to);
      }
  }
  // Writes 0 after the terms of a panel's chunk.
  static void pad(uint32_t* b, int64_t terms) {
    std::memset(b + terms * kColumns, 0, (padded(terms, kSide) - terms) * kColumns * sizeof *b);
  }

  // c[32, kColumns] (+)= a b, also for fewer rows.
  static void multiply(int64_t, const uint32_t* a, const uint32_t* b, int64_t terms, bool add, float* c) {
    static_assert(kColumns == 2 * kSide);
    constexpr int64_t kBytes = 4 * kColumns;  // from a row of b or c to the next
    float* const below = c + kSide * kColumns;
    __asm__ volatile("" ::: "memory");  // compilers do not know that loading a register reads memory
    if (add) {
      _tile_loadd(0, c, kBytes);
      _tile_loadd(1, c + kSide, kBytes);
      _tile_loadd(2, below, kBytes);
      _tile_loadd(3, below + kSide, kBytes);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int64_t k = 0; k < terms; k += kSide, a += 2 * kRegister, b += 2 * kRegister) {
      _tile_loadd(4, a, 4 * kSide);
      _tile_loadd(6, b, kBytes);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, b + kSide, kBytes);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(5, a + kRegister, 4 * kSide);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, kBytes);
    _tile_stored(1, c + kSide, kBytes);
    _tile_stored(2, below, kBytes);
    _tile_stored(3, below + kSide, kBytes);
  }
};

}  // namespace qlora
