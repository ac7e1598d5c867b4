// The same attention on bytes, for the int8 tier: both products in VNNI, softmax in float32.
//
// The idea: q, k and v are rounded per token and head where they are made. Scores are exact integers
// times two scales. A chunk's weights are rounded to 8 bits against the chunk's own largest score, so
// that a chunk of small weights keeps its precision; v's scale per token goes into them before.
// Cost: a quarter of the float products; the softmax (about 8 cycles for 16 scores) is then a third
// of the time. Rounding: 0.4 % of the largest weight, 0.4 % of a token's largest k and v.
// Source: the rounding per token follows SageAttention (Zhang et al. 2024), which keeps P V in fp16.
#pragma once
#include "attention.h"

#ifdef __AVX512VNNI__

namespace sd35 {

// q + 128 in [tokens][dim]; k in panels [dim / 4][64 tokens][4]; v in [tokens / 4][dim][4].
struct ByteHeads {
  uint8_t *q, *k, *v;
  float *q_scale, *k_scale, *v_scale;  // [B][heads][padded tokens]
  int32_t* k_start;                    // -128 * sum of k, which takes q's offset back
  int64_t heads, tokens, dim;

  int64_t padded() const { return round_up(tokens, PANEL); }
  int64_t row(int64_t b, int64_t head) const { return (b * heads + head) * padded(); }
};

// Epilogue of the q, k, v product in bytes; see SplitHeads.
struct SplitByteHeads {
  ByteHeads to;
  const float *q_norm, *k_norm;
  float eps;
  int64_t tokens, offset, skipped;
  float softmax_factor = LOG2_E / std::sqrt(static_cast<float>(to.dim));

  void operator()(int64_t row, int64_t col, float* v, int64_t cols) const {
    const int64_t b = over(row, tokens), token = row - b * tokens + offset, dim = to.dim;
    PartAndHead which(skipped + col, dim, to.heads);
    for (int64_t c = 0; c < cols; c += dim, which.next()) {
      const int64_t base = to.row(b, which.head), part = which.part, at = base + token;
      uint8_t bytes[PANEL];
      if (part == 0) {
        scale_head(v + c, dim, q_norm, eps, softmax_factor);
        to.q_scale[at] = quantise(v + c, dim, 128, to.q + at * dim);
      } else if (part == 1) {
        scale_head(v + c, dim, k_norm, eps, 1.0f);
        to.k_scale[at] = quantise(v + c, dim, 0, bytes);
        uint8_t* panel = to.k + (base + token / PANEL * PANEL) * dim + token % PANEL * 4;
        int32_t total = 0;
        for (int64_t d = 0; d < dim; d++) total += static_cast<int8_t>(bytes[d]);
        for (int64_t d = 0; d < dim; d += 4) std::memcpy(panel + d * PANEL, bytes + d, 4);
        to.k_start[at] = -128 * total;
      } else {
        to.v_scale[at] = quantise(v + c, dim, 0, bytes);
        uint8_t* four = to.v + (base + token / 4 * 4) * dim + token % 4;
        for (int64_t d = 0; d < dim; d++) four[d * 4] = bytes[d];
      }
    }
  }
};

// A chunk's scales of v over the largest of them, in 255ths: weights times these fit a byte.
struct ValueScales {
  float relative[KEYS], largest_scale;

  ValueScales(const float* scale, int64_t keys) {
    std::memcpy(relative, scale, keys * sizeof(float));
    std::fill(relative + keys, relative + KEYS, 0.0f);
    vfloat top{};
    for (int64_t i = 0; i < KEYS; i += LANES) top = larger(top, load(relative + i));
    largest_scale = largest(top);
    const float unit = largest_scale > 0 ? 255.0f / largest_scale : 0.0f;
    for (int64_t i = 0; i < KEYS; i += LANES) store(relative + i, load(relative + i) * unit);
  }
};

// s[0 .. keys) -> bytes; returns what the chunk's integer sums are multiplied by, shrinks what was.
INLINE float softmax_bytes(float* s, int64_t keys, const ValueScales& scales, uint8_t* bytes,
                           float& maximum, float& total, float& shrink) {
  const int64_t end = round_up(keys, LANES);
  for (int64_t i = keys; i < end; i++) s[i] = -INFINITY;
  vfloat top = load(s);
  for (int64_t i = LANES; i < end; i += LANES) {
    vfloat x = load(s + i);
    top = x > top ? x : top;
  }
  const float here = largest(top), before = maximum;
  maximum = std::max(before, here);
  vfloat added{};
  for (int64_t i = 0; i < end; i += LANES) {
    vfloat p = exp2_rough(load(s + i) - here);
    added += p;
    vint q = as_int(p * load(scales.relative + i) + ROUNDER) - 0x4B400000;
    *reinterpret_cast<vbyte_any*>(bytes + i) = __builtin_convertvector(q, vbyte);
  }
  const vfloat factors = exp2(vfloat{before - maximum, here - maximum});
  shrink = factors[0];
  total = total * shrink + factors[1] * sum(added);
  return factors[1] * scales.largest_scale / 255.0f;
}

// R queries from `first` of the task on meet one chunk of keys; V vectors are a head.
template <int R, int V>
void attend_byte_chunk(const ByteHeads& x, int64_t base, int64_t row, int64_t key, int64_t keys,
                       const ValueScales& scales, int64_t first, Queries& state) {
  alignas(64) float s[R][KEYS];
  alignas(64) uint8_t p[R][KEYS];
  constexpr int64_t DIM = V * LANES;
  const uint8_t* q = x.q + (base + row) * DIM;
  const int8_t* k = reinterpret_cast<const int8_t*>(x.k) + (base + key) * DIM;
  for (int64_t i = 0; i < keys; i += PANEL, k += PANEL * DIM) {
    __m512i acc[R][BLOCK_LANES];
    const int64_t at = base + key + i;
#pragma GCC unroll 6
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
      for (int v = 0; v < BLOCK_LANES; v++) acc[r][v] = _mm512_loadu_si512(x.k_start + at + v * LANES);
    multiply<R, BLOCK_LANES>(acc, q, DIM, k, 4 * PANEL, DIM);
#pragma GCC unroll 4
    for (int v = 0; v < BLOCK_LANES; v++) {
      const vfloat k_scale = load(x.k_scale + at + v * LANES);
#pragma GCC unroll 6
      for (int r = 0; r < R; r++)
        store(s[r] + i + v * LANES, to_float(acc[r][v]) * k_scale * x.q_scale[base + row + r]);
    }
  }
  float shrink[R], factor[R];
  for (int r = 0; r < R; r++)
    factor[r] = softmax_bytes(s[r], keys, scales, p[r], state.maximum[first + r],
                              state.total[first + r], shrink[r]);
  __m512i acc[R][V];
#pragma GCC unroll 6
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) acc[r][v] = _mm512_setzero_si512();
  const int8_t* values = reinterpret_cast<const int8_t*>(x.v) + (base + key) * DIM;
  multiply<R, V>(acc, p[0], KEYS, values, 4 * DIM, round_up(keys, 4));
#pragma GCC unroll 6
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
      float* o = state.o[first + r] + v * LANES;
      store(o, load(o) * shrink[r] + to_float(acc[r][v]) * factor[r]);
    }
}

inline void byte_attention_task(const ByteHeads& x, const AttentionGrid& grid, int64_t task,
                                const Joined& out) {
  const int64_t block = task % grid.blocks, head = task / grid.blocks % grid.heads;
  const int64_t b = task / grid.blocks / grid.heads, base = x.row(b, head);
  const int64_t row0 = grid.queries * block / grid.blocks;
  const int64_t count = grid.queries * (block + 1) / grid.blocks - row0;
  const int64_t groups = ceil_div(count, ROWS);
  Queries state;
  for (int64_t key = 0; key < x.tokens; key += KEYS) {
    const int64_t keys = std::min(KEYS, x.tokens - key);
    const ValueScales scales(x.v_scale + base + key, keys);
    for (int64_t group = 0; group < groups; group++) {
      const int64_t first = count * group / groups, rows = count * (group + 1) / groups - first;
#define SD35_CALL(R)                                                                              \
  (x.dim == 64   ? attend_byte_chunk<R, 4>(x, base, row0 + first, key, keys, scales, first, state) \
   : x.dim == 32 ? attend_byte_chunk<R, 2>(x, base, row0 + first, key, keys, scales, first, state) \
                 : attend_byte_chunk<R, 1>(x, base, row0 + first, key, keys, scales, first, state))
      SD35_BY_ROWS(rows, SD35_CALL)
#undef SD35_CALL
    }
  }
  state.write(x.dim, b, head, row0, count, out);
}

}  // namespace sd35

#endif
