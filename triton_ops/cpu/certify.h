// Which neurons are provably silent for one token, from int8 rows and their bounds; triton_ops/certificate.py has
// the proof, in the same notation.
#pragma once

#include <cmath>

#include "dots.h"

namespace {

constexpr int kInputMax = 32767;  // k is int16
constexpr int64_t kExact = 4096;  // products summed in at least 8 int32 lanes: at most 512 * 128 * 32767 < 2**31

// x as z * k + e, and what the bound of every row needs of it; norms are rounded up.
struct Quantised {
  double z, e, x;    // e and x: norms
  double g;          // x times the relative error of a computed dot product
  double underflow;  // what underflow may take, per norm of the row
  bool finite;
};

template <class W>
Quantised quantise(const typename W::Type* x, int16_t* k, int64_t D) {
  float largest = 0.0f;
  bool finite = true;
  for (int64_t i = 0; i < D; ++i) {
    const float v = std::fabs(W::widen(x[i]));
    largest = v > largest ? v : largest;
    finite &= v <= 3.4028234e38f;
  }
  const double z = double(largest) / kInputMax, inverse = largest > 0.0f ? kInputMax / double(largest) : 0.0;
  double e2 = 0.0, x2 = 0.0;
#pragma omp simd reduction(+ : e2, x2)
  for (int64_t i = 0; i < D; ++i) {
    const double v = W::widen(x[i]), q = finite ? std::nearbyint(v * inverse) : 0.0;
    k[i] = int16_t(q);
    const double e = v - z * q;        // whatever k is, e makes up for it
    e2 += e * e;
    x2 += v * v;
  }
  const double up = 1.0 + 1e-9;        // float64 has rounded the sums by parts in 1e12 at most
  const double n = double(roundings(D)) * 0x1p-24, norm = std::sqrt(x2) * up;
  return {z, std::sqrt(e2) * up, norm, n / (1.0 - n) * norm, 0x1p-120 * double(D), finite};
}

// q . k, exactly.
inline int64_t int8_dot(const int8_t* q, const int16_t* k, int64_t D) {
  int64_t total = 0;
  for (int64_t begin = 0; begin < D; begin += kExact) {
    const int64_t end = D - begin < kExact ? D : begin + kExact;
    int64_t i = begin;
#if defined(__AVX512BW__)
    auto add = [&](__m512i sums, int64_t at) {
      const __m512i u = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)(q + at)));
      const __m512i v = _mm512_loadu_si512(k + at);
#if defined(__AVX512VNNI__)
      return _mm512_dpwssd_epi32(sums, u, v);
#else
      return _mm512_add_epi32(sums, _mm512_madd_epi16(u, v));
#endif
    };
    __m512i even = _mm512_setzero_si512(), odd = even;
    for (; i + 64 <= end; i += 64) even = add(even, i), odd = add(odd, i + 32);
    const __m512i sums = _mm512_add_epi32(even, odd);
    total += _mm512_reduce_add_epi64(_mm512_add_epi64(_mm512_cvtepi32_epi64(_mm512_castsi512_si256(sums)),
                                                      _mm512_cvtepi32_epi64(_mm512_extracti64x4_epi64(sums, 1))));
#elif defined(__AVX2__)
    auto add = [&](__m256i sums, int64_t at) {
      const __m256i u = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)(q + at)));
      return _mm256_add_epi32(sums, _mm256_madd_epi16(u, _mm256_loadu_si256((const __m256i*)(k + at))));
    };
    __m256i even = _mm256_setzero_si256(), odd = even;
    for (; i + 32 <= end; i += 32) even = add(even, i), odd = add(odd, i + 16);
    const __m256i sums = _mm256_add_epi32(even, odd);
    int32_t lanes[8];
    _mm256_storeu_si256((__m256i*)lanes, sums);
    for (int j = 0; j < 8; ++j) total += lanes[j];
#else
    for (; i + 256 <= end; i += 256) {  // short enough for int32 in any order of additions; compilers vectorise it
      int32_t s = 0;
      for (int j = 0; j < 256; ++j) s += int32_t(q[i + j]) * int32_t(k[i + j]);
      total += s;
    }
#endif
    for (; i < end; ++i) total += int32_t(q[i]) * int32_t(k[i]);
  }
  return total;
}

// The next larger float; NaN and infinity stay what they are.
inline float next_up(float v) {
  const uint32_t u = as_bits(v + 0.0f);  // -0 becomes 0
  return std::isfinite(v) ? as_float(u & 0x80000000u ? u - 1 : u + 1) : v;
}

// Between what lies the dot product that dots() would compute for a row with these bounds and q . k = product;
// infinities where that is not known, or NaN.
struct Between {
  float least, most;
};

inline Between between(const float* bounds, double product, const Quantised& in) {
  const double s = bounds[0], r = bounds[1], m = bounds[2];
  if (!(in.finite && m * in.x < 0x1p126)) return {-INFINITY, INFINITY};
  const double exact = s * in.z * product;
  const double slack = (m + r) * in.e + r * in.x + m * in.g + in.underflow * (1.0 + m + in.x);
  // The last term: rounding of this very formula in float64.
  const double off = slack + 1e-12 * (slack + (m + r) * (in.x + in.e));
  return {-next_up(float(off - exact)), next_up(float(exact + off))};
}

}  // namespace
