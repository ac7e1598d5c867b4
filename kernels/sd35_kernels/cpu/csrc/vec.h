// A vector of floats as wide as the machine's registers, in GCC's vector types.
//
// The idea: arithmetic that is the same on every instruction set is written once, in vectors that
// the compiler lowers; only dot products of small integers need intrinsics (product.h, amx.h).
// Cost: exp2 is 8 instructions a vector (14 without AVX-512), GELU 17; both are used on values that
// cost hundreds of cycles to make.
#pragma once
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#define INLINE inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))

namespace sd35 {

#ifdef __AVX512F__
constexpr int64_t LANES = 16;
constexpr int BLOCK_LANES = 4;  // vectors of a register block: 6 x 4 of 32 registers
#else
constexpr int64_t LANES = 8;
constexpr int BLOCK_LANES = 2;  // 6 x 2 of 16 registers
#endif
typedef float vfloat __attribute__((vector_size(LANES * 4)));
typedef int32_t vint __attribute__((vector_size(LANES * 4)));
typedef uint8_t vbyte __attribute__((vector_size(LANES)));
typedef float vfloat_any __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint8_t vbyte_any __attribute__((vector_size(LANES), aligned(1), may_alias));
typedef uint16_t vhalf __attribute__((vector_size(LANES * 2)));
typedef uint16_t vhalf_any __attribute__((vector_size(LANES * 2), aligned(2), may_alias));

INLINE vfloat load(const float* p) { return *reinterpret_cast<const vfloat_any*>(p); }
INLINE void store(float* p, vfloat v) { *reinterpret_cast<vfloat_any*>(p) = v; }
INLINE vfloat as_float(vint v) { return (vfloat)v; }
INLINE vint as_int(vfloat v) { return (vint)v; }
INLINE vfloat splat(float x) {
#ifdef __AVX512F__
  return vfloat{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x};
#else
  return vfloat{x, x, x, x, x, x, x, x};
#endif
}

INLINE vint splat_int(int32_t x) {
#ifdef __AVX512F__
  return vint{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x};
#else
  return vint{x, x, x, x, x, x, x, x};
#endif
}

// float to bf16, ties to even; a NaN keeps its quiet bit, so that rounding cannot make it infinite.
INLINE vhalf to_half(vfloat v) {
  vint bits = as_int(v);
  vint rounded = bits + 0x7fff + ((bits >> 16) & 1);
  return __builtin_convertvector(((v == v) ? rounded : bits | 0x400000) >> 16, vhalf);
}

// Lane i + N of v in lane i, round the end.
template <int N, class V>
INLINE V rotate(V v) {
#ifdef __AVX512F__
#define SD35_LANE(i) ((i) + N) % 16
  return __builtin_shufflevector(v, v, SD35_LANE(0), SD35_LANE(1), SD35_LANE(2), SD35_LANE(3),
                                 SD35_LANE(4), SD35_LANE(5), SD35_LANE(6), SD35_LANE(7), SD35_LANE(8),
                                 SD35_LANE(9), SD35_LANE(10), SD35_LANE(11), SD35_LANE(12),
                                 SD35_LANE(13), SD35_LANE(14), SD35_LANE(15));
#else
#define SD35_LANE(i) ((i) + N) % 8
  return __builtin_shufflevector(v, v, SD35_LANE(0), SD35_LANE(1), SD35_LANE(2), SD35_LANE(3),
                                 SD35_LANE(4), SD35_LANE(5), SD35_LANE(6), SD35_LANE(7));
#endif
#undef SD35_LANE
}

// All lanes into one by halves: 4 shuffles deep, where lane after lane is 16 additions deep.
template <class V, class Op>
INLINE auto reduce(V v, Op op) {
  if (LANES == 16) v = op(v, rotate<8>(v));
  v = op(v, rotate<4>(v));
  v = op(v, rotate<2>(v));
  v = op(v, rotate<1>(v));
  return v[0];
}

INLINE float sum(vfloat v) {
  return reduce(v, [](vfloat a, vfloat b) { return a + b; });
}

// The comparisons are written so that a NaN in v stays: a fault must be seen in the image.
#ifdef __AVX512F__
// g++ makes two instructions of the comparisons; these two give their second operand for NaN.
INLINE vfloat at_least(vfloat v, float low) { return (vfloat)_mm512_max_ps((__m512)splat(low), (__m512)v); }
INLINE vfloat at_most(vfloat v, float high) { return (vfloat)_mm512_min_ps((__m512)splat(high), (__m512)v); }
#else
INLINE vfloat at_least(vfloat v, float low) { return v < low ? splat(low) : v; }
INLINE vfloat at_most(vfloat v, float high) { return v > high ? splat(high) : v; }
#endif

INLINE vfloat larger(vfloat a, vfloat b) { return (b > a) | (b != b) ? b : a; }
INLINE float largest(vfloat v) {
  return reduce(v, [](vfloat a, vfloat b) { return larger(a, b); });
}
INLINE int32_t largest(vint v) {
  return reduce(v, [](vint a, vint b) { return b > a ? b : a; });
}

// Adding 1.5 * 2^23 rounds to the nearest integer and leaves it in the low bits.
constexpr float ROUNDER = 12582912.0f;

// 2^v for v <= 127 of which those below -126 count as -126; 1.2e-7 relative. AVX-512 splits v and puts
// it together again in an instruction each, and on [0, 1) the fifth power is enough (least squares on
// Chebyshev points); else Taylor series to the sixth power on [-1/2, 1/2], exponent by shifting.
INLINE vfloat exp2_below(vfloat v) {
  v = at_least(v, -126.0f);
#ifdef __AVX512DQ__
  const vfloat f = (vfloat)_mm512_reduce_ps((__m512)v, 9);  // v - floor(v)
  vfloat p = splat(1.87757594e-3f);
  p = p * f + 8.98934187e-3f;
  p = p * f + 5.58263166e-2f;
  p = p * f + 2.40153618e-1f;
  p = p * f + 6.93153073e-1f;
  p = p * f + 9.99999925e-1f;
  return (vfloat)_mm512_scalef_ps((__m512)p, (__m512)v);
#else
  vfloat shifted = v + ROUNDER;
  vfloat f = v - (shifted - ROUNDER);
  vfloat p = splat(1.54035304e-4f);
  p = p * f + 1.33335581e-3f;
  p = p * f + 9.61812911e-3f;
  p = p * f + 5.55041087e-2f;
  p = p * f + 2.40226507e-1f;
  p = p * f + 6.93147181e-1f;
  p = p * f + 1.0f;
  return as_float(as_int(p) + (as_int(shifted) << 23));
#endif
}

INLINE vfloat exp2(vfloat v) { return exp2_below(at_most(v, 127.0f)); }

#ifdef __AVX512DQ__
// The same, 8e-5 relative, for weights that are rounded to eight bits.
INLINE vfloat exp2_rough(vfloat v) {
  v = at_least(v, -126.0f);
  const vfloat f = (vfloat)_mm512_reduce_ps((__m512)v, 9);
  vfloat p = splat(7.80244584e-2f);
  p = p * f + 2.26067247e-1f;
  p = p * f + 6.95833509e-1f;
  p = p * f + 9.99925220e-1f;
  return (vfloat)_mm512_scalef_ps((__m512)p, (__m512)v);
}
#endif

// 1 / v, 1e-7 relative: an estimate and one Newton step, a third of a division's time.
INLINE vfloat reciprocal(vfloat v) {
#ifdef __AVX512F__
  const vfloat estimate = (vfloat)_mm512_rcp14_ps((__m512)v);
  return estimate * (2.0f - v * estimate);
#else
  return 1.0f / v;
#endif
}

// GELU, tanh form: v * sigmoid(2 u), u = sqrt(2/pi) (v + 0.044715 v^3); 2 log2(e) is in the constants.
INLINE vfloat gelu(vfloat v) {
  vfloat u = v * (v * v * (-2.302208198f * 0.044715f) - 2.302208198f);
  return v * reciprocal(1.0f + exp2(u));
}

}  // namespace sd35
