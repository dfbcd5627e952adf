// SiLU and both GELUs in float32, to a few units in the last place. V is float or Vec.
//
// Infinity and NaN give what torch's formulas give, or infinity where these have NaN through 0 * inf.
#pragma once

#include "vector.h"

namespace {
namespace smooth {

inline uint32_t bits(float v) { return as_bits(v); }
inline Bits bits(Vec v) { return reinterpret_cast<Bits>(v); }
inline float floats(uint32_t u) { return as_float(u); }
inline Vec floats(Bits u) { return reinterpret_cast<Vec>(u); }

template <class V>
V magnitude(V v) {
  return floats(bits(v) & 0x7fffffffu);
}

// e^v: n is the integer next to v / ln 2, r = v - n ln 2 with ln 2 in two parts, of which n times the first is exact,
// and e^r its Taylor series, whose rest is below 2^-27. Less than 2^-125 is 0.
template <class V>
V exp(V v) {
  const V shifted = v * 1.44269504f + 0x1.8p23f;  // n in its last bits
  const V n = shifted - 0x1.8p23f;
  const V r = (v - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;
  V sum = V{} + 1.0f / 5040;
  for (float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) sum = sum * r + c;
  const V power = floats((bits(shifted) << 23) + (126u << 23));  // 2^(n - 1), for 2^128 is no float
  const V value = sum * power * 2.0f;
  return v > 89.0f ? V{} + as_float(0x7f800000u) : v < -86.6f ? V{} : value;
}

// Q(m) = 1 - Φ(m) of the normal distribution, m >= 0: e^(-m²/2) s P(s) with s = 1 / (1 + 0.3 m). P was fitted to the
// smallest relative error for m up to 14, which is 1.5e-8 with these coefficients; from 13.2 on the result is 0.
template <class V>
V upper_tail(V m) {
  const V s = 1.0f / (1.0f + 0.3f * m);
  V sum = V{} + -0.0206130818f;
  for (float c : {0.112377152f, -0.228070766f, 0.191586033f, -0.0792509541f, 0.0960597694f, 0.0784249157f, 0.110227466f,
                  0.119572826f, 0.119686633f})
    sum = sum * s + c;
  return exp(-0.5f * m * m) * (sum * s);
}

struct silu {
  template <class V> static V at(V p) { return p / (1.0f + exp(-p)); }
};

struct gelu {
  template <class V> static V at(V p) {  // p Φ(p)
    const V tail = upper_tail(magnitude(p));
    return p * (p < 0.0f ? tail : 1.0f - tail);
  }
};

struct gelu_tanh {
  template <class V> static V at(V p) {  // p (1 + tanh u) / 2 = p / (1 + e^(-2u)), u = sqrt(2 / π) (p + 0.044715 p³)
    return p / (1.0f + exp(-1.59576912f * (p + 0.044715f * p * p * p)));
  }
};

}  // namespace smooth
}  // namespace
