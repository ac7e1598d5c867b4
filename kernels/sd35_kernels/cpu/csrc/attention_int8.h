// The same attention on bytes, for the int8 tier: both products in VNNI, softmax in float32.
//
// The idea: q, k and v are rounded per token and head where they are made. Scores are exact integers
// times two scales. A chunk's weights are rounded to 8 bits against the chunk's own largest score, so
// that a chunk of small weights keeps its precision; v's scale per token goes into them before.
// Cost: a quarter of the float products, 8 cycles for 16 scores and channels each; the softmax, 13
// instructions for 16 scores, takes nearly as long.
// Rounding: 0.4 % of the largest weight, 0.4 % of a token's largest k and v.
// Source: the rounding per token follows SageAttention (Zhang et al. 2024), which keeps P V in fp16.
#pragma once
#include "attention.h"

#ifdef __AVX512VNNI__

namespace sd35 {

// q + 128 in [tokens][dim]; k in panels [dim / 4][64 tokens][4]; v in panels [16][dim][4], the four
// tokens 16 apart, as four vectors of weights woven into one have them.
struct ByteHeads {
  uint8_t *q, *k, *v;
  float *q_scale, *k_scale, *v_scale;  // [B][heads][padded tokens]
  int32_t* k_start;                    // -128 * sum of k, which takes q's offset back
  int64_t heads, tokens, dim;

  int64_t padded() const { return round_up(tokens, PANEL); }
  int64_t row(int64_t b, int64_t head) const { return (b * heads + head) * padded(); }
};

// One token's channels into a panel of v: every fourth byte of a line, the others' stay.
INLINE void write_value(uint8_t* panel, int64_t token, int64_t dim, const uint8_t* bytes) {
  const int64_t place = token / LANES;
  const __mmask64 mine = 0x1111111111111111ull << place;
  for (int64_t d = 0; d < dim; d += LANES) {
    const __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes + d)));
    const __m512i moved = _mm512_sll_epi32(wide, _mm_cvtsi64_si128(8 * place));
    _mm512_mask_storeu_epi8(panel + (token % LANES * dim + d) * 4, mine, moved);
  }
}

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
        // Never 0, by which a score of -infinity would become NaN.
        to.q_scale[at] = std::max(quantise(v + c, dim, 128, to.q + at * dim), 1e-30f);
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
        write_value(to.v + (base + token / PANEL * PANEL) * dim, token % PANEL, dim, bytes);
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

// The lowest bytes of four vectors as one, byte by byte: lane i holds those of lane i of each.
INLINE __m512i weave(vint a, vint b, vint c, vint d) {
  constexpr int FIRST_WHERE_SET = 0xCA;
  auto put = [](vint low, vint high, int bits) {
    const __m512i mask = _mm512_set1_epi32((1 << bits) - 1);
    return (vint)_mm512_ternarylogic_epi32(mask, (__m512i)low, (__m512i)(high << bits), FIRST_WHERE_SET);
  };
  return (__m512i)put(put(put(a, b, 8), c, 16), d, 24);
}

// s[r] = R queries times a chunk of keys, over q's scale, -infinity beyond; top: each 16th's largest.
template <int R, int V>
INLINE void byte_scores(const ByteHeads& x, int64_t at, const uint8_t* q, int64_t keys, float (&s)[R][KEYS],
                        vfloat (&top)[R]) {
  constexpr int64_t DIM = V * LANES;
  const vint lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const int8_t* k = reinterpret_cast<const int8_t*>(x.k) + at * DIM;
  for (int r = 0; r < R; r++) top[r] = splat(-INFINITY);
  for (int64_t i = 0; i < keys; i += PANEL, at += PANEL, k += PANEL * DIM) {
    __m512i acc[R][BLOCK_LANES];
#pragma GCC unroll 6
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
      for (int v = 0; v < BLOCK_LANES; v++) acc[r][v] = _mm512_loadu_si512(x.k_start + at + v * LANES);
    multiply<R, BLOCK_LANES>(acc, q, DIM, k, 4 * PANEL, DIM);
    auto finish = [&](auto kept) INLINE_LAMBDA {
#pragma GCC unroll 4
      for (int v = 0; v < BLOCK_LANES; v++) {
        const vfloat k_scale = load(x.k_scale + at + v * LANES);
#pragma GCC unroll 6
        for (int r = 0; r < R; r++) {
          const vfloat score = kept(to_float(acc[r][v]) * k_scale, v);
          store(s[r] + i + v * LANES, score);
          top[r] = score > top[r] ? score : top[r];
        }
      }
    };
    const int32_t live = static_cast<int32_t>(std::min(PANEL, keys - i));
    if (live == PANEL) finish([](vfloat score, int) INLINE_LAMBDA { return score; });
    else finish([&](vfloat score, int v) INLINE_LAMBDA {
      return lane + v * static_cast<int32_t>(LANES) < live ? score : splat(-INFINITY);
    });
  }
}

// One row: s -> weights over the chunk's largest score, in bytes, woven; returns their sums by lane.
INLINE vfloat byte_weights(const float* s, int64_t keys, float scale, float largest_score,
                           const ValueScales& scales, uint8_t* bytes) {
  vfloat added{};
  for (int64_t i = 0; i < keys; i += PANEL) {
    vint q[BLOCK_LANES];
#pragma GCC unroll 4
    for (int64_t v = 0; v < BLOCK_LANES; v++) {
      const vfloat p = exp2_rough(load(s + i + v * LANES) * scale - largest_score);
      added += p;
      q[v] = as_int(p * load(scales.relative + i + v * LANES) + ROUNDER);
    }
    _mm512_storeu_si512(bytes + i, weave(q[0], q[1], q[2], q[3]));
  }
  return added;
}

// R queries from `first` of the task on meet one chunk of keys; V vectors are a head.
template <int R, int V>
void attend_byte_chunk(const ByteHeads& x, int64_t base, int64_t row, int64_t key, int64_t keys,
                       const ValueScales& scales, int64_t first, Queries& state) {
  alignas(64) float s[R][KEYS];
  alignas(64) uint8_t p[R][KEYS];
  constexpr int64_t DIM = V * LANES;
  vfloat tops[R], added[R];
  float top[R], shrink[R], factor[R];
  byte_scores<R, V>(x, base + key, x.q + (base + row) * DIM, keys, s, tops);
  const float* q_scale = x.q_scale + base + row;
#pragma GCC unroll 6
  for (int r = 0; r < R; r++) top[r] = largest(tops[r]) * q_scale[r];
  Seen<R> seen{state.maximum + first, state.total + first};
  seen.raise(top, shrink, factor);
  for (int r = 0; r < R; r++) added[r] = byte_weights(s[r], keys, q_scale[r], top[r], scales, p[r]);
#pragma GCC unroll 6
  for (int r = 0; r < R; r++) {
    seen.total[r] = seen.total[r] * shrink[r] + factor[r] * sum(added[r]);
    factor[r] *= scales.largest_scale / 255.0f;
  }
  __m512i acc[R][V];
#pragma GCC unroll 6
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) acc[r][v] = _mm512_setzero_si512();
  const int8_t* values = reinterpret_cast<const int8_t*>(x.v) + (base + key) * DIM;
  const int64_t lines = keys / PANEL * LANES + std::min(LANES, keys % PANEL);  // of four tokens
  multiply<R, V>(acc, p[0], KEYS, values, 4 * DIM, 4 * lines);
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
