// Products of bytes and of bf16 on AMX tiles, behind a few operations that any CPU can emulate.
//
// The idea: the packed weights of product.h are tiles already: 16 rows of a panel's k-fours by 16
// channels are 16 lines of 64 bytes, 256 bytes apart. Activations are read where they lie, 16 rows of
// 64 bytes. So only the inner loop differs from VNNI: 32 rows by 32 channels in four accumulators,
// each loaded tile used twice. Panels of bf16 have 64 channels x 2 k in the same 256 bytes, so their
// tiles lie alike and hold half as many k. With SD35_AMX_EMULATED the operations are plain loops, so that packing,
// the ends of rows and the epilogues are tested on machines without AMX.
// Cost: 32,768 operations an instruction, one in 16 cycles: 8 times VNNI. 4 tile loads for 4 products.
// Source: Intel SDM, TDPBUSD, TDPBF16PS, TILELOADD, LDTILECFG.
#pragma once
#include "vec.h"

#if defined(SD35_AMX_EMULATED) || defined(SD35_AMX_TILES)
#define SD35_AMX 1
#ifndef SD35_AMX_EMULATED
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace sd35 {

constexpr int64_t TILE_ROWS = 16;
constexpr int64_t TILE_BYTES = 64;  // of a row: 64 k of activations, 16 channels x 4 k of weights

#ifdef SD35_AMX_EMULATED

inline thread_local uint8_t emulated_tiles[8][TILE_ROWS * TILE_BYTES];

inline bool tiles_begin() { return true; }
inline void tiles_end() {}
template <int T>
void tile_zero() {
  std::memset(emulated_tiles[T], 0, sizeof emulated_tiles[T]);
}
template <int T>
void tile_load(const void* p, int64_t stride) {
  for (int64_t r = 0; r < TILE_ROWS; r++)
    std::memcpy(emulated_tiles[T] + r * TILE_BYTES, static_cast<const char*>(p) + r * stride, TILE_BYTES);
}
template <int T>
void tile_store(void* p) {
  std::memcpy(p, emulated_tiles[T], sizeof emulated_tiles[T]);
}
template <int C, int A, int B>
void tile_dot() {
  int32_t* c = reinterpret_cast<int32_t*>(emulated_tiles[C]);
  const int8_t* b = reinterpret_cast<const int8_t*>(emulated_tiles[B]);
  for (int64_t m = 0; m < TILE_ROWS; m++)
    for (int64_t k = 0; k < TILE_ROWS; k++)
      for (int64_t n = 0; n < 16; n++)
        for (int64_t i = 0; i < 4; i++)
          c[m * 16 + n] += emulated_tiles[A][m * TILE_BYTES + k * 4 + i] * b[(k * 16 + n) * 4 + i];
}
inline float half_to_float(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
template <int C, int A, int B>
void tile_dot_half() {
  float* c = reinterpret_cast<float*>(emulated_tiles[C]);
  const uint16_t* a = reinterpret_cast<const uint16_t*>(emulated_tiles[A]);
  const uint16_t* b = reinterpret_cast<const uint16_t*>(emulated_tiles[B]);
  for (int64_t m = 0; m < TILE_ROWS; m++)
    for (int64_t k = 0; k < TILE_ROWS; k++)
      for (int64_t n = 0; n < 16; n++)
        for (int64_t i = 0; i < 2; i++)
          c[m * 16 + n] += half_to_float(a[m * 32 + k * 2 + i]) * half_to_float(b[(k * 16 + n) * 2 + i]);
}

#else

// Ask Linux for the tiles once, then set all eight to 16 rows of 64 bytes. False where it refuses.
inline bool tiles_begin() {
  static const bool allowed = !syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18);
  if (!allowed) return false;
  alignas(64) uint8_t config[64] = {};
  config[0] = 1;
  for (int i = 0; i < 8; i++) config[16 + 2 * i] = TILE_BYTES, config[48 + i] = TILE_ROWS;
  // g++ 12 believes that only 8 bytes are read and would drop the stores above.
  asm volatile("" ::"r"(&config) : "memory");
  _tile_loadconfig(config);
  return true;
}
inline void tiles_end() { _tile_release(); }
template <int T>
INLINE void tile_zero() {
  _tile_zero(T);
}
template <int T>
INLINE void tile_load(const void* p, int64_t stride) {
  _tile_loadd(T, p, stride);
}
template <int T>
INLINE void tile_store(void* p) {
  _tile_stored(T, p, TILE_BYTES);
}
template <int C, int A, int B>
INLINE void tile_dot() {
  _tile_dpbusd(C, A, B);
}
template <int C, int A, int B>
INLINE void tile_dot_half() {
  _tile_dpbf16ps(C, A, B);
}

#endif

// sums[4][16][16] = 32 rows of a times 32 channels of b, integers or, of bf16, floats; `size` bytes of
// k, a multiple of 64, in each row of a; b a panel of 64 channels.
template <bool HALF>
INLINE void tile_products(const void* a, int64_t row_bytes, const void* b, int64_t size, void* sums) {
  const char *rows = static_cast<const char*>(a), *panel = static_cast<const char*>(b);
  tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
  for (int64_t i = 0; i < size; i += TILE_BYTES) {
    tile_load<4>(rows + i, row_bytes);
    tile_load<6>(panel + i * 64, 256);
    tile_load<7>(panel + i * 64 + 64, 256);
    tile_load<5>(rows + i + TILE_ROWS * row_bytes, row_bytes);
    if (HALF) {
      tile_dot_half<0, 4, 6>(), tile_dot_half<1, 4, 7>();
      tile_dot_half<2, 5, 6>(), tile_dot_half<3, 5, 7>();
    } else {
      tile_dot<0, 4, 6>(), tile_dot<1, 4, 7>();
      tile_dot<2, 5, 6>(), tile_dot<3, 5, 7>();
    }
  }
  char* to = static_cast<char*>(sums);
  tile_store<0>(to), tile_store<1>(to + 1024), tile_store<2>(to + 2048), tile_store<3>(to + 3072);
}

// What int8_block does, for up to 32 rows; rows behind them are read and not used.
inline void tile_block(int64_t rows, const uint8_t* a, int64_t lda, const int8_t* b, int64_t k,
                       const int32_t* start, const float* scale, int64_t scales, float* tile,
                       int64_t ldt, bool first) {
  alignas(64) int32_t sums[4 * 256];
  for (int64_t half = 0; half < 2; half++) {
    tile_products<false>(a, lda, b + half * 128, k, sums);
    for (int64_t r = 0; r < rows; r++)
      for (int64_t v = 0; v < 2; v++) {
        const int32_t* sum = sums + r / 16 * 512 + v * 256 + r % 16 * 16;
        const int64_t col = half * 32 + v * 16;
        float* out = tile + r * ldt + col;
        vint whole;
        vint offset;
        std::memcpy(&whole, sum, sizeof whole), std::memcpy(&offset, start + col, sizeof offset);
        const vfloat part = __builtin_convertvector(whole + offset, vfloat) * scale[r * scales];
        store(out, first ? part : load(out) + part);
      }
  }
}

// What half_block does, for up to 32 rows; k is a multiple of 32.
inline void half_tile_block(int64_t rows, const uint16_t* a, int64_t lda, const uint16_t* b, int64_t k,
                            float* tile, int64_t ldt, bool first) {
  alignas(64) float sums[4 * 256];
  for (int64_t half = 0; half < 2; half++) {
    tile_products<true>(a, 2 * lda, b + half * 64, 2 * k, sums);
    for (int64_t r = 0; r < rows; r++)
      for (int64_t v = 0; v < 2; v++) {
        float* out = tile + r * ldt + half * 32 + v * 16;
        const vfloat part = load(sums + r / 16 * 512 + v * 256 + r % 16 * 16);
        store(out, first ? part : load(out) + part);
      }
  }
}

}  // namespace sd35

#endif
