// The machine's own limit, beside every measurement: multiply-adds on registers alone.
//
// The idea: a shared host halves a core from one second to the next and no counter says so; a loop
// without memory, timed beside the work, sees it. Cost: 24 accumulators x 100,000 rounds, about 1 ms.
#pragma once
#include "product.h"

namespace sd35 {

constexpr int64_t PEAK_ROUNDS = 100000;
constexpr int PEAK_REGISTERS = BLOCK_LANES * ROWS;

// Operations of one call with `threads` threads, a multiply-add counted as two.
inline double peak(int64_t kind, int64_t threads) {
#pragma omp parallel num_threads(static_cast<int>(threads))
  {
    if (kind == FP32) {
      vfloat acc[PEAK_REGISTERS] = {}, x = splat(0.5f);
      for (int64_t i = 0; i < PEAK_ROUNDS; i++)
#pragma GCC unroll 24
        for (int r = 0; r < PEAK_REGISTERS; r++) {
          acc[r] = acc[r] * x + x;
          asm volatile("" : "+v"(acc[r]));
        }
    }
    if (kind == BF16) {
      vfloat acc[PEAK_REGISTERS] = {};
      const vint x = splat_int(0x3f003f00);  // a pair of 0.5
      for (int64_t i = 0; i < PEAK_ROUNDS; i++)
#pragma GCC unroll 24
        for (int r = 0; r < PEAK_REGISTERS; r++) {
          dot2(acc[r], x, x);
          asm volatile("" : "+v"(acc[r]));
        }
    }
#ifdef __AVX512VNNI__
    if (kind == INT8) {
      __m512i acc[PEAK_REGISTERS] = {}, x = _mm512_set1_epi8(1);
      for (int64_t i = 0; i < PEAK_ROUNDS; i++)
#pragma GCC unroll 24
        for (int r = 0; r < PEAK_REGISTERS; r++) {
          dot4(acc[r], x, x);
          asm volatile("" : "+v"(acc[r]));
        }
    }
#endif
  }
  return 2.0 * PEAK_ROUNDS * PEAK_REGISTERS * LANES * (4 / bytes_of(kind)) * threads;
}

}  // namespace sd35
