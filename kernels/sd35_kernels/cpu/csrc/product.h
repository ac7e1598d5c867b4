// Linear layers on packed weights: y = x W^T + b, with the epilogue run while y is in the cache.
//
// The idea: W [N, K] is packed once into panels of 64 output channels, k by k, so that the inner
// loop reads 4 registers of weights and broadcasts 6 activations into 24 accumulators. A task is a
// block of rows times a group of panels; its result is a tile in the cache, which an epilogue turns
// into what the next layer reads (epilogue.h).
// Cost: 2 M N K operations; in the inner loop 24 multiply-adds for 10 loads, so that 2 multiply-adds
// a cycle are the limit. It holds while weights and activations come from L2 (148 of 149 GFLOP/s
// on a Cascade Lake core), so a task's weights are cut to 393 KB of L2 in channels and, for long rows,
// in K, and its unfinished sums to 262 KB. Memory lies in huge pages: with pages of 4 KB the same loops
// ran 15 % (float) to 50 % (int8) slower. Prefetching the next rows gave nothing.
//
// bf16: both operands lie in pairs of k, weights [k / 2][64][2] a panel; a lane adds two products to a
// float. Without an instruction for it the pair is taken apart and added by two multiply-adds.
//
// int8: activations are q + 128 in uint8, weights int8; 128 * (sum of a weight column) is taken off
// where the accumulators start, so that the operands need no other correction. Scales: one per row of
// activations and K-chunk, one per output channel. The sum of a chunk is exact in int32: K <= 131,072.
#pragma once
#include <algorithm>

#include "amx.h"
#include "team.h"
#include "vec.h"

namespace sd35 {

constexpr int64_t PANEL = 64;        // output channels of a panel
constexpr int64_t ROWS = 6;          // rows of the register block
constexpr int64_t GROUP_BYTES = 393216;  // weights of a task that stay in L2
constexpr int64_t TILE = 65536;          // unfinished sums of a task, in floats

enum Kind : int64_t { FP32 = 0, INT8 = 1, BF16 = 2 };

constexpr int64_t bytes_of(int64_t kind) { return kind == FP32 ? 4 : kind == BF16 ? 2 : 1; }

struct Linear {
  const void* weight;    // packed, see pack()
  const float* bias;     // [N padded to PANEL]
  const float* scale;    // INT8: [N padded], else null
  const int32_t* start;  // INT8: [K / chunk][N padded], -128 * column sums
  int64_t n, k;
  int64_t chunk;         // INT8: K channels under one activation scale
  int64_t kind;
};

// Activations as a product reads them: row-major float or bf16, or uint8 with a scale per row and chunk.
struct Rows {
  void* data;
  float* scale;  // INT8: [rows][chunks]
  int64_t width;
  int64_t chunks;
  int64_t kind = FP32;

  const float* floats(int64_t row) const { return static_cast<const float*>(data) + row * width; }
  const uint16_t* halves(int64_t row) const { return static_cast<const uint16_t*>(data) + row * width; }
  const uint8_t* bytes(int64_t row) const { return static_cast<const uint8_t*>(data) + row * width; }
};

// Quotients of row and channel numbers in 32 bits: a 64-bit division costs 90 cycles on this side of
// Ice Lake, as much as 6 rows of GELU.
INLINE int64_t over(int64_t a, int64_t b) { return static_cast<uint32_t>(a) / static_cast<uint32_t>(b); }
INLINE int64_t rest(int64_t a, int64_t b) { return static_cast<uint32_t>(a) % static_cast<uint32_t>(b); }

INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// acc[r][v] += sum over k of a[r][k] * b[k][v]; b has `ldb` floats a row.
template <int R, int V>
INLINE void multiply(vfloat (&acc)[R][V], const float* a, int64_t lda, const float* b, int64_t ldb,
                     int64_t k) {
  for (int64_t i = 0; i < k; i++, b += ldb) {
    vfloat w[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) w[v] = load(b + v * LANES);
#pragma GCC unroll 6
    for (int r = 0; r < R; r++) {
      vfloat x = splat(a[r * lda + i]);
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) acc[r][v] += x * w[v];
    }
  }
}

// tile[r][64] (+)= one panel over one chunk of K.
template <int R>
void float_block(const float* a, int64_t lda, const float* b, int64_t k, float* tile, int64_t ldt,
                 bool first) {
  constexpr int V = BLOCK_LANES;
  for (int64_t col = 0; col < PANEL; col += V * LANES, b += V * LANES, tile += V * LANES) {
    vfloat acc[R][V];
#pragma GCC unroll 6
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) acc[r][v] = first ? vfloat{} : load(tile + r * ldt + v * LANES);
    multiply<R, V>(acc, a, lda, b, PANEL, k);
#pragma GCC unroll 6
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) store(tile + r * ldt + v * LANES, acc[r][v]);
  }
}

// acc += two products of bf16 a lane.
INLINE void dot2(vfloat& acc, vint x, vint w) {
#ifdef __AVX512BF16__
  acc = (vfloat)_mm512_dpbf16_ps((__m512)acc, (__m512bh)x, (__m512bh)w);
#else
  acc += as_float(x << 16) * as_float(w << 16);
  acc += as_float(x >> 16 << 16) * as_float(w >> 16 << 16);
#endif
}

// float_block on bf16; k is even.
template <int R>
void half_block(const uint16_t* a, int64_t lda, const uint16_t* b, int64_t k, float* tile, int64_t ldt,
                bool first) {
  constexpr int V = BLOCK_LANES;
  for (int64_t col = 0; col < PANEL; col += V * LANES, b += 2 * V * LANES, tile += V * LANES) {
    vfloat acc[R][V];
#pragma GCC unroll 6
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) acc[r][v] = first ? vfloat{} : load(tile + r * ldt + v * LANES);
    for (int64_t i = 0; i < k; i += 2) {
      vint w[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) std::memcpy(&w[v], b + i * PANEL + v * 2 * LANES, sizeof w[v]);
#pragma GCC unroll 6
      for (int r = 0; r < R; r++) {
        int32_t pair;
        std::memcpy(&pair, a + r * lda + i, sizeof pair);
        const vint x = splat_int(pair);
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) dot2(acc[r][v], x, w[v]);
      }
    }
#pragma GCC unroll 6
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) store(tile + r * ldt + v * LANES, acc[r][v]);
  }
}

#ifdef __AVX512VNNI__
// acc += four products of a uint8 and an int8 a lane. By hand: g++ 12 copies the accumulator of the
// intrinsic and spills half of the 24 (measured: 445 -> 210 G operations a second).
INLINE void dot4(__m512i& acc, __m512i x, __m512i w) {
  asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(x), "v"(w));
}

// The same loop on bytes: b has `ldb` bytes for each four of k.
template <int R, int V>
INLINE void multiply(__m512i (&acc)[R][V], const uint8_t* a, int64_t lda, const int8_t* b, int64_t ldb,
                     int64_t k) {
  for (int64_t i = 0; i < k; i += 4, b += ldb) {
    __m512i w[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) w[v] = _mm512_loadu_si512(b + v * 64);
#pragma GCC unroll 6
    for (int r = 0; r < R; r++) {
      __m512i x = _mm512_set1_epi32(*reinterpret_cast<const int32_t*>(a + r * lda + i));
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) dot4(acc[r][v], x, w[v]);
    }
  }
}

INLINE vfloat to_float(__m512i v) { return __builtin_convertvector((vint)v, vfloat); }

template <int R>
void int8_block(const uint8_t* a, int64_t lda, const int8_t* b, int64_t k, const int32_t* start,
                const float* scale, int64_t scales, float* tile, int64_t ldt, bool first) {
  __m512i acc[R][BLOCK_LANES];
#pragma GCC unroll 6
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int v = 0; v < BLOCK_LANES; v++) acc[r][v] = _mm512_loadu_si512(start + v * LANES);
  multiply<R, BLOCK_LANES>(acc, a, lda, b, 4 * PANEL, k);
#pragma GCC unroll 6
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int v = 0; v < BLOCK_LANES; v++) {
      float* out = tile + r * ldt + v * LANES;
      vfloat part = to_float(acc[r][v]) * scale[r * scales];
      store(out, first ? part : load(out) + part);
    }
}
#endif

// Calls f<R>() for 1 <= rows <= 6.
#define SD35_BY_ROWS(rows, CALL) \
  switch (rows) {                \
    case 1: CALL(1); break;      \
    case 2: CALL(2); break;      \
    case 3: CALL(3); break;      \
    case 4: CALL(4); break;      \
    case 5: CALL(5); break;      \
    default: CALL(6); break;     \
  }

// How a product of `m` rows is cut into tasks: rows x cols of the result, K in steps.
struct Grid {
  int64_t m, n, rows, cols, step, down, across;

  // `group`: channels that one task must hold together, or 0.
  Grid(const Linear& layer, int64_t m, int64_t threads, int64_t group = 0) : m(m), n(layer.n) {
    const int64_t whole = layer.k * bytes_of(layer.kind);
    const int64_t least = group ? group : layer.kind == FP32 ? 2 * PANEL : PANEL;
    cols = std::max(least, std::min<int64_t>(256, GROUP_BYTES / whole / PANEL * PANEL));
    cols = std::min(cols, round_up(n, PANEL));
    step = layer.k;
    if (whole * cols > GROUP_BYTES * 3 / 2) {
      const int64_t unit = layer.kind == FP32 ? 1 : layer.kind == BF16 ? 32 : layer.chunk;
      step = round_up(ceil_div(layer.k, ceil_div(whole * cols, GROUP_BYTES)), unit);
    }
    rows = std::max<int64_t>(1, step < layer.k ? std::min(m, TILE / cols) : m);
    auto tasks = [&] { return ceil_div(m, rows) * ceil_div(n, cols); };
    // Smaller tasks where there are few: first rows down to 96, then channels, then rows again.
    while (tasks() < 4 * threads && rows > 96) rows = ceil_div(rows, 2);
    while (tasks() < 4 * threads && !group && cols > PANEL) cols = round_up(cols / 2, PANEL);
    while (tasks() < 4 * threads && rows > 24) rows = ceil_div(rows, 2);
    down = ceil_div(m, rows), across = ceil_div(n, cols);
    rows = ceil_div(m, std::max<int64_t>(down, 1));
  }
  int64_t count() const { return down * across; }
};

// Whether the inner loop runs on AMX tiles: their lines hold 64 bytes of k.
INLINE bool in_tiles([[maybe_unused]] const Linear& layer) {
#ifdef SD35_AMX
  if (layer.kind == INT8) return layer.chunk % TILE_BYTES == 0;
  return layer.kind == BF16 && 2 * layer.k % TILE_BYTES == 0;
#else
  return false;
#endif
}

// One panel of channels from `col` on, K from k0 to k1, into tile.
INLINE void block_product(const Linear& layer, const Rows& x, int64_t row, int64_t rows, int64_t col,
                          int64_t k0, int64_t k1, float* tile, int64_t ldt) {
  if (layer.kind == FP32) {
    const float* b = static_cast<const float*>(layer.weight) + col * layer.k + k0 * PANEL;
    const float* a = x.floats(row) + k0;
#define SD35_CALL(R) float_block<R>(a, x.width, b, k1 - k0, tile, ldt, k0 == 0)
    SD35_BY_ROWS(rows, SD35_CALL)
#undef SD35_CALL
  } else if (layer.kind == BF16) {
    const uint16_t* b = static_cast<const uint16_t*>(layer.weight) + col * layer.k + k0 * PANEL;
    const uint16_t* a = x.halves(row) + k0;
#ifdef SD35_AMX
    if (in_tiles(layer)) return half_tile_block(rows, a, x.width, b, k1 - k0, tile, ldt, k0 == 0);
#endif
#define SD35_CALL(R) half_block<R>(a, x.width, b, k1 - k0, tile, ldt, k0 == 0)
    SD35_BY_ROWS(rows, SD35_CALL)
#undef SD35_CALL
  } else {
#ifdef __AVX512VNNI__
    for (int64_t k = k0; k < k1; k += layer.chunk) {
      const int64_t chunk = k / layer.chunk;
      const int8_t* b = static_cast<const int8_t*>(layer.weight) + col * layer.k + k * PANEL;
      const uint8_t* a = x.bytes(row) + k;
      const int32_t* start = layer.start + chunk * round_up(layer.n, PANEL) + col;
      const float* scale = x.scale + row * x.chunks + chunk;
      const int64_t size = std::min(layer.chunk, k1 - k);
#ifdef SD35_AMX
      if (in_tiles(layer)) {
        tile_block(rows, a, x.width, b, size, start, scale, x.chunks, tile, ldt, k == 0);
        continue;
      }
#endif
#define SD35_CALL(R) int8_block<R>(a, x.width, b, size, start, scale, x.chunks, tile, ldt, k == 0)
      SD35_BY_ROWS(rows, SD35_CALL)
#undef SD35_CALL
    }
#endif
  }
}

// Rows that the inner loop takes at once.
INLINE int64_t block_rows(const Linear& layer) { return in_tiles(layer) ? 32 : ROWS; }

// One task: rows x channels of y. epilogue(row, col, values, cols) gets one finished row at a time.
template <class Epilogue>
void product_task(const Linear& layer, const Rows& x, const Grid& grid, int64_t task, float* tile,
                  Epilogue&& epilogue) {
  const int64_t row0 = task % grid.down * grid.rows, row1 = std::min(row0 + grid.rows, grid.m);
  const int64_t col0 = task / grid.down * grid.cols, col1 = std::min(col0 + grid.cols, grid.n);
  const int64_t ldt = round_up(col1 - col0, PANEL);
  const int64_t blocks = ceil_div(row1 - row0, block_rows(layer));
  const bool once = grid.step >= layer.k;  // then a block of rows is finished before the next
  for (int64_t k0 = 0; k0 < layer.k; k0 += grid.step) {
    const int64_t k1 = std::min(k0 + grid.step, layer.k);
    for (int64_t block = 0; block < blocks; block++) {
      const int64_t r0 = row0 + (row1 - row0) * block / blocks;
      const int64_t r1 = row0 + (row1 - row0) * (block + 1) / blocks;
      float* out = tile + (once ? 0 : r0 - row0) * ldt;
      for (int64_t col = col0; col < col1; col += PANEL)
        block_product(layer, x, r0, r1 - r0, col, k0, k1, out + (col - col0), ldt);
      if (k1 < layer.k) continue;
      for (int64_t row = r0; row < r1; row++, out += ldt) {
        for (int64_t c = 0; c < ldt; c += LANES) {
          vfloat v = load(out + c);
          if (layer.scale) v *= load(layer.scale + col0 + c);
          store(out + c, v + load(layer.bias + col0 + c));
        }
        epilogue(row, col0, out, col1 - col0);
      }
    }
  }
}

// Pack W [n, k] into panels [n / 64][k][64] of floats; channels beyond n are zero.
inline void pack_float(const float* w, int64_t n, int64_t k, float* packed) {
  for (int64_t col = 0; col < round_up(n, PANEL); col++) {
    float* panel = packed + col / PANEL * PANEL * k + col % PANEL;
    for (int64_t i = 0; i < k; i++) panel[i * PANEL] = col < n ? w[col * k + i] : 0.0f;
  }
}

// Pack W into panels [n / 64][k / 2][64][2] of bf16; k is even.
inline void pack_half(const float* w, int64_t n, int64_t k, uint16_t* packed) {
  for (int64_t col = 0; col < round_up(n, PANEL); col++) {
    uint16_t* panel = packed + col / PANEL * PANEL * k + col % PANEL * 2;
    for (int64_t i = 0; i < k; i++)
      panel[i / 2 * 2 * PANEL + i % 2] = col < n ? to_half(splat(w[col * k + i]))[0] : 0;
  }
}

// Pack and quantise W into panels [n / 64][k / 4][64][4] of int8; k is a multiple of 4.
inline void pack_int8(const float* w, int64_t n, int64_t k, int64_t chunk, int8_t* packed,
                      float* scale, int32_t* start) {
  const int64_t columns = round_up(n, PANEL);
  std::fill(start, start + ceil_div(k, chunk) * columns, 0);
  for (int64_t col = 0; col < columns; col++) {
    float top = 0;
    for (int64_t i = 0; col < n && i < k; i++) top = std::max(top, std::fabs(w[col * k + i]));
    scale[col] = top > 0 ? top / 127.0f : 1.0f;
    int8_t* panel = packed + col / PANEL * PANEL * k + col % PANEL * 4;
    for (int64_t i = 0; i < k; i++) {
      const float q = col < n ? std::nearbyint(w[col * k + i] / scale[col]) : 0.0f;
      const int8_t value = static_cast<int8_t>(std::min(127.0f, std::max(-127.0f, q)));
      panel[i / 4 * 4 * PANEL + i % 4] = value;
      start[i / chunk * columns + col] -= 128 * value;
    }
  }
}

}  // namespace sd35
