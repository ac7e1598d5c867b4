// Softmax(Q K^T) V over the tokens of two streams, float32, heads of 16, 32 or 64 channels.
//
// The idea: the two streams are joined only in where their projections are written: image tokens
// first, then text, in one buffer a head. K is written in panels of 64 tokens, channel by channel, so
// that both products have the shape of product.h's inner loop. A task is a head and 48 queries; keys
// come in chunks of 256 with a running maximum and sum, so that no row of scores leaves L1.
// Cost: 4 S^2 D operations, 1 exp2 a score (about 8 cycles for 16). A chunk of K and V is 128 KB at 64
// channels and is read from L2 by each 6 of the 48 queries, then never again in the task.
#pragma once
#include "epilogue.h"

namespace sd35 {

constexpr int64_t KEYS = 256;     // keys in a chunk
constexpr int64_t QUERIES = 48;   // queries in a task
constexpr float LOG2_E = 1.44269504088896f;

// Q, K, V of one attention, all heads: q and v [B][heads][tokens][dim], k in panels.
struct Heads {
  float *q, *k, *v;
  int64_t heads, tokens, dim;

  int64_t padded() const { return round_up(tokens, PANEL); }
  int64_t size() const { return heads * padded() * dim; }  // floats an image
  int64_t base(int64_t b, int64_t head) const { return b * size() + head * padded() * dim; }
};

// Which of q, k, v and which head a channel belongs to, for heads one after another.
struct PartAndHead {
  int64_t part, head, heads;

  PartAndHead(int64_t channel, int64_t dim, int64_t heads) : heads(heads) {
    const int64_t index = over(channel, dim);
    part = over(index, heads), head = index - part * heads;
  }
  void next() {
    if (++head == heads) head = 0, part++;
  }
};

// x *= factor, under an RMS norm with `weight` where there is one.
INLINE void scale_head(float* x, int64_t dim, const float* weight, float eps, float factor) {
  if (weight) {
    vfloat squares{};
    for (int64_t d = 0; d < dim; d += LANES) squares += load(x + d) * load(x + d);
    factor /= std::sqrt(sum(squares) / static_cast<float>(dim) + eps);
  }
  for (int64_t d = 0; d < dim; d += LANES)
    store(x + d, load(x + d) * (weight ? load(weight + d) * factor : splat(factor)));
}

// Epilogue of the q, k, v product: QK-RMSNorm and the layouts of attention. Softmax's 1 / sqrt(dim)
// and log2(e) go into q, so that scores are exponents of two.
struct SplitHeads {
  Heads to;
  const float* q_norm;  // [dim] or null
  const float* k_norm;
  float eps;
  int64_t tokens;  // of this stream in an image
  int64_t offset;  // of this stream's first token in the joint sequence
  int64_t skipped; // channels that the packed weights leave out at the front (q of the last text)
  float softmax_factor = LOG2_E / std::sqrt(static_cast<float>(to.dim));

  void operator()(int64_t row, int64_t col, float* v, int64_t cols) const {
    const int64_t b = over(row, tokens), token = row - b * tokens + offset, dim = to.dim;
    PartAndHead at(skipped + col, dim, to.heads);
    for (int64_t c = 0; c < cols; c += dim, at.next()) {
      const int64_t base = to.base(b, at.head), part = at.part;
      float* x = v + c;
      if (part == 0) {
        scale_head(x, dim, q_norm, eps, softmax_factor);
        std::memcpy(to.q + base + token * dim, x, dim * sizeof(float));
      } else if (part == 1) {
        scale_head(x, dim, k_norm, eps, 1.0f);
        float* panel = to.k + base + token / PANEL * PANEL * dim + token % PANEL;
        for (int64_t d = 0; d < dim; d++) panel[d * PANEL] = x[d];
      } else {
        std::memcpy(to.v + base + token * dim, x, dim * sizeof(float));
      }
    }
  }
};

// Where a row of the result goes: the first stream's buffer or the second's.
struct Joined {
  float *first, *second;  // [B * tokens][width]
  int64_t first_tokens, second_tokens, width;

  float* row(int64_t b, int64_t token) const {
    return token < first_tokens ? first + (b * first_tokens + token) * width
                                : second + (b * second_tokens + token - first_tokens) * width;
  }
};

template <int R>
INLINE void scores(const float* q, const float* k, int64_t dim, float (*s)[KEYS], int64_t keys) {
  for (int64_t key = 0; key < keys; key += PANEL, k += dim * PANEL)
    float_block<R>(q, dim, k, dim, s[0] + key, KEYS, true);
}

// What R queries have seen of their scores: the largest, and the sum of weights.
template <int R>
struct Seen {
  float* maximum;
  float* total;

  // Raises the maxima to those of a chunk, `top`; shrink: what earlier sums are multiplied by.
  // factor: what the chunk's own are, where its weights are over its own largest score.
  INLINE void raise(const float (&top)[R], float (&shrink)[R], float (&factor)[R]) {
    // The rows' exponents share vectors: one at a time each waits 60 cycles for its own.
    alignas(64) float gap[2 * LANES] = {};
    for (int r = 0; r < R; r++) {
      const float before = maximum[r];
      maximum[r] = std::max(before, top[r]);
      gap[r] = before - maximum[r], gap[LANES + r] = top[r] - maximum[r];
    }
    store(gap, exp2_below(load(gap))), store(gap + LANES, exp2_below(load(gap + LANES)));
    for (int r = 0; r < R; r++) shrink[r] = gap[r], factor[r] = gap[LANES + r];
  }
};

// s[r][0 .. keys) -> 2^(s - maximum), zero beyond; shrink: by how much earlier sums shrink. All rows
// are reduced together, since one row's shuffles alone leave the core idle.
template <int R>
INLINE void softmax_chunk(float (&s)[R][KEYS], int64_t keys, Seen<R> seen, float (&shrink)[R]) {
  const int64_t end = round_up(keys, LANES);
  float top[R], unused[R];
  vfloat tops[R], added[R];
  for (int r = 0; r < R; r++) {
    for (int64_t i = keys; i < end; i++) s[r][i] = -INFINITY;
    tops[r] = load(s[r]);
    for (int64_t i = LANES; i < end; i += LANES) {
      vfloat x = load(s[r] + i);
      tops[r] = x > tops[r] ? x : tops[r];
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; r++) top[r] = largest(tops[r]);
  seen.raise(top, shrink, unused);
  for (int r = 0; r < R; r++) {
    const float maximum = seen.maximum[r];
    added[r] = vfloat{};
    for (int64_t i = 0; i < end; i += LANES) {
      vfloat p = exp2_below(load(s[r] + i) - maximum);
      store(s[r] + i, p);
      added[r] += p;
    }
  }
  // Lanes beyond `keys` hold 2^-126, not 0: they vanish in the sum and are not multiplied.
#pragma GCC unroll 6
  for (int r = 0; r < R; r++) seen.total[r] = seen.total[r] * shrink[r] + sum(added[r]);
}

// o = o * shrink + p v, `dim` channels.
template <int R, int V>
INLINE void weigh(float (*o)[PANEL], const float* shrink, const float* p, const float* v, int64_t dim,
                  int64_t keys) {
  for (int64_t d = 0; d < dim; d += V * LANES) {
    vfloat acc[R][V];
#pragma GCC unroll 6
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
      for (int i = 0; i < V; i++) acc[r][i] = load(o[r] + d + i * LANES) * shrink[r];
    multiply<R, V>(acc, p, KEYS, v + d, dim, keys);
#pragma GCC unroll 6
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
      for (int i = 0; i < V; i++) store(o[r] + d + i * LANES, acc[r][i]);
  }
}

// What a query has so far: the weighted sum of values, the largest score and the sum of weights.
struct Queries {
  float o[QUERIES][PANEL], maximum[QUERIES], total[QUERIES];

  Queries() {
    std::memset(o, 0, sizeof o), std::memset(total, 0, sizeof total);
    std::fill(maximum, maximum + QUERIES, -INFINITY);
  }

  void write(int64_t dim, int64_t b, int64_t head, int64_t row0, int64_t count, const Joined& out) const {
    for (int64_t r = 0; r < count; r++) {
      float* to = out.row(b, row0 + r) + head * dim;
      for (int64_t d = 0; d < dim; d += LANES) store(to + d, load(o[r] + d) / total[r]);
    }
  }
};

// R queries from `first` of the task on meet one chunk of keys.
template <int R, int V>
void attend_chunk(const Heads& x, int64_t base, const float* q, int64_t key, int64_t keys, int64_t first,
                  Queries& state) {
  float s[R][KEYS], shrink[R];
  scores<R>(q, x.k + base + key * x.dim, x.dim, s, keys);
  softmax_chunk<R>(s, keys, {state.maximum + first, state.total + first}, shrink);
  weigh<R, V>(state.o + first, shrink, s[0], x.v + base + key * x.dim, x.dim, keys);
}

struct AttentionGrid {
  int64_t queries, blocks, heads, batch;

  // `queries`: how many of the tokens ask; those behind them are only asked.
  AttentionGrid(int64_t batch, int64_t heads, int64_t queries)
      : queries(queries), blocks(ceil_div(queries, QUERIES)), heads(heads), batch(batch) {}
  int64_t count() const { return batch * heads * blocks; }
};

inline void attention_task(const Heads& x, const AttentionGrid& grid, int64_t task, const Joined& out) {
  const int64_t block = task % grid.blocks, head = task / grid.blocks % grid.heads;
  const int64_t b = task / grid.blocks / grid.heads, base = x.base(b, head);
  const int64_t row0 = grid.queries * block / grid.blocks;
  const int64_t count = grid.queries * (block + 1) / grid.blocks - row0;
  const int64_t groups = ceil_div(count, ROWS);
  Queries state;
  for (int64_t key = 0; key < x.tokens; key += KEYS) {
    const int64_t keys = std::min(KEYS, x.tokens - key);
    for (int64_t group = 0; group < groups; group++) {
      const int64_t first = count * group / groups, rows = count * (group + 1) / groups - first;
      const float* q = x.q + base + (row0 + first) * x.dim;
#define SD35_CALL(R)                                                                            \
  (x.dim % (BLOCK_LANES * LANES) == 0                                                           \
       ? attend_chunk<R, BLOCK_LANES>(x, base, q, key, keys, first, state)                      \
   : x.dim == 32 ? attend_chunk<R, 32 / LANES>(x, base, q, key, keys, first, state)             \
                 : attend_chunk<R, 16 / LANES>(x, base, q, key, keys, first, state))
      SD35_BY_ROWS(rows, SD35_CALL)
#undef SD35_CALL
    }
  }
  state.write(x.dim, b, head, row0, count, out);
}

}  // namespace sd35
