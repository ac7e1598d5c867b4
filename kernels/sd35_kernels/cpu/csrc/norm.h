// LayerNorm without weights, modulated: n * scale + shift, written as the next product reads it.
//
// Cost: a row is read once from memory and stays in L1 for three passes (mean, variance, output);
// 8 bytes and about 6 operations a value, 2-3 % of a block.
#pragma once
#include "epilogue.h"

namespace sd35 {

struct Modulation {
  const float* shift;  // [width], of one image
  const float* scale;  // holds 1 + scale
};

// n[width] = (x - mean) / sqrt(variance + eps).
INLINE void normalise(const float* x, int64_t width, float eps, float* n) {
  vfloat total{}, squares{};
  for (int64_t c = 0; c < width; c += LANES) total += load(x + c);
  const vfloat mean = splat(sum(total) / static_cast<float>(width));
  for (int64_t c = 0; c < width; c += LANES) {
    vfloat d = load(x + c) - mean;
    store(n + c, d);
    squares += d * d;
  }
  const vfloat inverse = splat(1.0f / std::sqrt(sum(squares) / static_cast<float>(width) + eps));
  for (int64_t c = 0; c < width; c += LANES) store(n + c, load(n + c) * inverse);
}

// Write one row of the modulated n. temporary: [width]. chunk: channels under one scale.
INLINE void modulate(const float* n, int64_t width, const Modulation& m, const Rows& out, int64_t row,
                     float* temporary) {
  for (int64_t c = 0; c < width; c += LANES)
    store(temporary + c, load(n + c) * load(m.scale + c) + load(m.shift + c));
  const int64_t chunk = width / out.chunks;
  for (int64_t c = 0; c < width; c += chunk) emit(out, row, c, temporary + c, chunk);
}

}  // namespace sd35
