// What happens to a finished row of a product before it leaves the cache.
//
// The idea: every producer writes what its consumer reads, so that no pass over memory stands
// between two products. Cost: 1-20 instructions for 16 values that took K / 2 cycles (float) or K / 8
// (int8) to make; without them each pass would read and write 8 bytes a value.
#pragma once
#include "product.h"

namespace sd35 {

// x[row] += gate[batch] * v: the residual stream. `tokens`: rows of one image.
struct AddGated {
  float* x;
  const float* gate;
  int64_t gate_stride, tokens, width;

  void operator()(int64_t row, int64_t col, const float* v, int64_t cols) const {
    float* out = x + row * width + col;
    const float* g = gate + over(row, tokens) * gate_stride + col;
    for (int64_t c = 0; c < cols; c += LANES)
      store(out + c, load(out + c) + load(g + c) * load(v + c));
  }
};

// x[row] = v + position[token]: the patch embedding.
struct AddPosition {
  float* x;
  const float* position;
  int64_t tokens, width;

  void operator()(int64_t row, int64_t col, const float* v, int64_t cols) const {
    const float* p = position + rest(row, tokens) * width + col;
    for (int64_t c = 0; c < cols; c += LANES)
      store(x + row * width + col + c, load(v + c) + load(p + c));
  }
};

// out[row] = v, for tests and for products that stand alone.
struct Keep {
  float* out;
  int64_t width;

  void operator()(int64_t row, int64_t col, const float* v, int64_t cols) const {
    std::memcpy(out + row * width + col, v, cols * sizeof(float));
  }
};

// Quantise n values under one scale, which is returned: bytes are q + offset, |q| <= 127.
INLINE float quantise(const float* v, int64_t n, int32_t offset, uint8_t* bytes) {
  // The largest magnitude as an integer: NaN and infinity sort above every number and are kept.
  vint top{};
  for (int64_t c = 0; c < n; c += LANES) {
    vint bits = as_int(load(v + c)) & 0x7fffffff;
    top = bits > top ? bits : top;
  }
  const int32_t most = largest(top);
  float size;
  std::memcpy(&size, &most, sizeof size);
  const float inverse = size > 1e-30f ? 127.0f / size : 0.0f;
  for (int64_t c = 0; c < n; c += LANES) {
    vint q = as_int(load(v + c) * inverse + ROUNDER) - (0x4B400000 - offset);
    *reinterpret_cast<vbyte_any*>(bytes + c) = __builtin_convertvector(q, vbyte);
  }
  return size / 127.0f;
}

// Row `row` of rows to be multiplied next: channels [col, col + cols) of it, as floats, bf16 or, under
// one scale, as q + 128. For uint8, `cols` is one chunk.
INLINE void emit(const Rows& out, int64_t row, int64_t col, const float* v, int64_t cols) {
  if (out.kind == BF16) {
    uint16_t* to = static_cast<uint16_t*>(out.data) + row * out.width + col;
    for (int64_t c = 0; c < cols; c += LANES)
      *reinterpret_cast<vhalf_any*>(to + c) = to_half(load(v + c));
    return;
  }
  if (!out.scale) {
    std::memcpy(static_cast<float*>(out.data) + row * out.width + col, v, cols * sizeof(float));
    return;
  }
  const int64_t chunk = out.chunks == 1 ? 0 : over(col, over(out.width, out.chunks));
  uint8_t* bytes = static_cast<uint8_t*>(out.data) + row * out.width + col;
  out.scale[row * out.chunks + chunk] = quantise(v, cols, 128, bytes);
}

// The MLP's hidden layer: GELU, then the layout of the second product.
struct Gelu {
  Rows out;

  void operator()(int64_t row, int64_t col, float* v, int64_t cols) const {
    for (int64_t c = 0; c < cols; c += LANES) store(v + c, gelu(load(v + c)));
    emit(out, row, col, v, cols);
  }
};

// Rows of the final layer back into an image: channels of v are (y, x, c) of a patch.
struct Unpatchify {
  float* velocity;  // [B, channels, h * patch, w * patch]
  int64_t h, w, patch, channels;

  void operator()(int64_t row, int64_t col, const float* v, int64_t cols) const {
    const int64_t b = row / (h * w), y = row / w % h, x = row % w;
    for (int64_t i = col; i < col + cols; i++) {
      const int64_t c = i % channels, px = i / channels % patch, py = i / channels / patch;
      velocity[((b * channels + c) * h * patch + y * patch + py) * w * patch + x * patch + px] =
          v[i - col];
    }
  }
};

}  // namespace sd35
