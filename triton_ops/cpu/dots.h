// Dot products of weight rows with the inputs of a few tokens. In one dot product the order of additions depends on
// D alone, never on how many rows or tokens are worked on at once.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "calls.h"
#include "vector.h"

namespace {

constexpr int kAhead = 6;                      // rows worked on at most; every list has as many more pointers
constexpr int kTile = kManyRegisters ? 4 : 2;  // tokens worked on at once

// How rows and inputs are multiplied: as float vectors.
template <class W>
struct Product {
  typedef float In;                               // what inputs are stored as
  static constexpr int kSums = 2;                 // vectors of sums per dot product
  // After so many steps sums start anew, so that rounding errors do not add up over long rows; 0: never, where they
  // vanish in the rounding of the result.
  static constexpr int64_t kSteps = sizeof(typename W::Type) == 2 ? 0 : 128;
  struct Pair {
    Vec a, b;
  };
  static Pair row(const typename W::Type* p) {
    Pair v;
    W::load(p, v.a, v.b);
    return v;
  }
  static Pair input(const float* p) {
    Pair v;
    Float32::load(p, v.a, v.b);
    return v;
  }
  static void add(Vec* sums, const Pair& w, const Pair& x) {
    sums[0] += w.a * x.a;
    sums[1] += w.b * x.b;
  }
  static void move(Vec* sums, Vec* before) {  // to start anew
    for (int k = 0; k < kSums; ++k) before[k] += sums[k], sums[k] = Vec{};
  }
  static float total(const Vec* sums) { return sum(sums[0] + sums[1]); }

  // x, of dtype X, in the order in which row() delivers weights, with zeros up to padded(D). Returns the factor that
  // makes x of it.
  template <class X>
  static float prepare(const typename X::Type* x, float* out, int64_t D) {
    if constexpr (!std::is_same<X, W>::value) {  // int8 rows come in their order
      for (int64_t i = 0; i < padded(D); ++i) out[i] = i < D ? X::widen(x[i]) : 0.0f;
      return 1.0f;
    }
    typename X::Type tail[kStep] = {};
    for (int64_t i = 0; i < D; i += kStep) {
      if (i + kStep > D) std::memcpy(tail, x + i, (D - i) * sizeof tail[0]);
      Vec a, b;
      X::load(i + kStep > D ? tail : x + i, a, b);
      Float32::store(out + i, a, b);
    }
    return 1.0f;
  }
};

#if defined(__AVX512BF16__)
// bfloat16 products two by two, exact, summed in float32: twice the rate. It takes subnormal numbers as zero.
template <>
struct Product<BFloat16> {
  typedef uint16_t In;
  static constexpr int kSums = 1;
  static constexpr int64_t kSteps = 0;
  typedef __m512bh Pair;
  static Pair row(const uint16_t* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static Pair input(const uint16_t* p) { return row(p); }
  static void add(Vec* sums, const Pair& w, const Pair& x) {
    sums[0] = (Vec)_mm512_dpbf16_ps((__m512)sums[0], w, x);
  }
  static void move(Vec*, Vec*) {}
  static float total(const Vec* sums) { return sum(sums[0]); }
  template <class X>
  static float prepare(const uint16_t* x, uint16_t* out, int64_t D) {
    std::memcpy(out, x, D * 2);
    std::memset(out + D, 0, (padded(D) - D) * 2);
    return 1.0f;
  }
};
#endif

// int8 rows times the inputs of a token in fixed point, int16: exact in integers, at more than twice the rate of floats.
struct Int8Fixed : Int8 {};

template <class X>
typename X::Magnitude largest_magnitude(const typename X::Type* x, int64_t n) {
  typename X::Magnitude largest = 0;
  for (int64_t i = 0; i < n; ++i) largest = std::max(largest, typename X::Magnitude(X::magnitude(x[i])));
  return largest;
}

// Whether that costs less than half of what rounding a result to bfloat16 does: the error of an input, 2**-16 / sqrt(3)
// of the largest as a root mean square, against the mean of those that are not zero. Some models have an input that is
// a thousand times the others, and rows that do not look at it.
inline bool may_be_fixed(const uint16_t* x, int64_t D) {
  const float largest = BFloat16::widen(largest_magnitude<BFloat16>(x, D));
  float sum = 0.0f, count = 0.0f;
#pragma omp simd reduction(+ : sum, count)
  for (int64_t i = 0; i < D; ++i) {
    const float v = std::fabs(BFloat16::widen(x[i]));
    sum += v, count += v != 0.0f;
  }
  // The last: of smaller ones a step is no normal number. Infinity and NaN fail the first.
  return (largest <= 3.4e38f && largest * count <= 64.0f * sum && largest > 1e-30f) || largest == 0.0f;
}

#if defined(__AVX512BW__) || (defined(__AVX2__) && !defined(__AVX512F__))
constexpr bool kFixed = true;

template <>
struct Product<Int8Fixed> {
  typedef int16_t In;
  static constexpr int kSums = 1;                 // of int32
  static constexpr int64_t kSteps = 4096 / kStep; // a lane gets two products a step: below 512 * 128 * 32768 = 2**31
  static_assert(kStep * 2 == kBytes, "a step is a vector of inputs");
#if defined(__AVX512BW__)
  typedef __m512i Pair;
  static Pair row(const int8_t* p) { return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)p)); }
  static Pair input(const int16_t* p) { return _mm512_loadu_si512(p); }
  static void add(Vec* sums, const Pair& w, const Pair& x) {
#if defined(__AVX512VNNI__)
    sums[0] = (Vec)_mm512_dpwssd_epi32((__m512i)sums[0], w, x);
#else
    sums[0] = (Vec)_mm512_add_epi32((__m512i)sums[0], _mm512_madd_epi16(w, x));
#endif
  }
#else
  typedef __m256i Pair;
  static Pair row(const int8_t* p) { return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p)); }
  static Pair input(const int16_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
  static void add(Vec* sums, const Pair& w, const Pair& x) {
    sums[0] = (Vec)_mm256_add_epi32((__m256i)sums[0], _mm256_madd_epi16(w, x));
  }
#endif
  static void move(Vec* sums, Vec* before) {
    before[0] += __builtin_convertvector((Mask)sums[0], Vec), sums[0] = Vec{};
  }
  static float total(const Vec* sums) { return sum(sums[0]); }
  template <class X>
  static float prepare(const typename X::Type* x, int16_t* out, int64_t D) {
    const float step = X::widen(largest_magnitude<X>(x, D)) / 32767.0f;
    const float inverse = step > 0.0f ? 1.0f / step : 0.0f;
    for (int64_t i = 0; i < D; ++i) out[i] = int16_t(as_bits(X::widen(x[i]) * inverse + kWhole) - as_bits(kWhole));
    std::memset(out + D, 0, (padded(D) - D) * sizeof out[0]);
    return step;
  }
};
#else
constexpr bool kFixed = false;

template <>
struct Product<Int8Fixed> : Product<Int8> {};
#endif

// An upper bound of the roundings that one product goes through on its way into the sum of D products; see
// triton_ops/certificate.py. Generously: two for every step of the loop (kSteps adds one for many), and the tree of the
// last sum.
inline int64_t roundings(int64_t D) { return 4 * (padded(D) / kStep) + 16; }

// out[r * N + t] = rows[r] . x[t]. Fetch: the next R rows are asked for on the way.
template <class W, int R, int N, bool Fetch>
void dots(const typename W::Type* const* rows, const typename Product<W>::In* const* x, int64_t D, float* out) {
  typedef Product<W> P;
  Vec sums[R][N][P::kSums] = {}, before[R][N][P::kSums] = {};
  typename P::Pair in[N];
  int64_t i = 0;
  for (;;) {
    const int64_t end = P::kSteps && D - i > P::kSteps * kStep ? i + P::kSteps * kStep : D;
    for (; i + kStep <= end; i += kStep) {
      for (int t = 0; t < N; ++t) in[t] = P::input(x[t] + i);
      for (int r = 0; r < R; ++r) {
        const typename P::Pair w = P::row(rows[r] + i);
        if (Fetch) fetch(rows[r + R] + i, kStep * sizeof(typename W::Type));
        for (int t = 0; t < N; ++t) P::add(sums[r][t], w, in[t]);
      }
    }
    if (end == D) break;
    for (int r = 0; r < R; ++r)
      for (int t = 0; t < N; ++t) P::move(sums[r][t], before[r][t]);
  }
  if (i < D) {
    for (int t = 0; t < N; ++t) in[t] = P::input(x[t] + i);
    for (int r = 0; r < R; ++r) {
      typename W::Type tail[kStep] = {};
      std::memcpy(tail, rows[r] + i, (D - i) * sizeof tail[0]);
      const typename P::Pair w = P::row(tail);
      for (int t = 0; t < N; ++t) P::add(sums[r][t], w, in[t]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int t = 0; t < N; ++t) {
      if (P::kSteps) P::move(sums[r][t], before[r][t]);
      out[r * N + t] = P::total(P::kSteps ? before[r][t] : sums[r][t]);
    }
}

// products[j * T + t], of the row index[j] or, without index, j, times the scale of that row and the factor of its
// token; as they are without scales.
inline void times_scales(float* products, const float* scales, const float* factors, const int32_t* index, int64_t n,
                         int64_t T) {
  if (!scales) return;
  for (int64_t j = 0; j < n; ++j)
    for (int64_t t = 0; t < T; ++t) products[j * T + t] *= scales[index ? index[j] : j] * factors[t];
}

// R rows with the T inputs x[0], x[1], …, tile by tile; the result of row r and input t goes to
// out[r * stride + column[t]]. Fetch: the next R rows are asked for on the way.
template <class W, int R>
void dots_inputs(const typename W::Type* const* rows, const typename Product<W>::In* const* x,
                 const int32_t* column, int64_t T, int64_t D, float* out, int64_t stride, bool fetch) {
  float tile[R * kTile];
  for (int64_t t = 0, n; t < T; t += n) {
    n = T - t < kTile ? T - t : kTile;
    auto run = [&](auto count) {
      constexpr int N = decltype(count)::value;
      if (t == 0 && fetch)
        dots<W, R, N, true>(rows, x, D, tile);
      else
        dots<W, R, N, false>(rows, x + t, D, tile);
      for (int r = 0; r < R; ++r)
        for (int j = 0; j < N; ++j) out[r * stride + column[t + j]] = tile[r * N + j];
    };
    switch (n) {
      case 1: run(std::integral_constant<int, 1>{}); break;
      case 2: run(std::integral_constant<int, 2>{}); break;
      case 3: run(std::integral_constant<int, kTile < 3 ? 1 : 3>{}); break;
      default: run(std::integral_constant<int, kTile>{}); break;
    }
  }
}

// The same for a number of rows that is known only now, 1 to R.
template <class W, int R>
void dots_rows(int64_t n, const typename W::Type* const* rows, const typename Product<W>::In* const* x,
               const int32_t* column, int64_t T, int64_t D, float* out, int64_t stride, bool fetch) {
  if (n == R)
    dots_inputs<W, R>(rows, x, column, T, D, out, stride, fetch);
  else if constexpr (R > 1)
    dots_rows<W, R - 1>(n, rows, x, column, T, D, out, stride, fetch);
}

// out[r * stride + column[t]] = rows[r] . x[t] for n rows; rows[n] … rows[n + kAhead - 1] are needed next.
// Adjacent: the rows lie one after the other in memory. Then one by one is the fastest way to read them for few tokens;
// rows that lie apart are faster to read four at once, because the hardware prefetcher starts anew with each. For many
// tokens it is arithmetic that counts: as many rows as there are registers for their sums.
template <class W>
void all_dots(const typename W::Type* const* rows, int64_t n, const typename Product<W>::In* const* x,
              const int32_t* column, int64_t T, int64_t D, float* out, int64_t stride, bool adjacent) {
  constexpr bool slim = Product<W>::kSums == 1;
  const int64_t most = T <= 2 ? (adjacent ? 1 : 4) : !slim ? 2 : T <= kTile ? 4 : kAhead;
  // With one tile only, time is reading, and hardware prefetchers alone do better; but not where a line takes as long to
  // be multiplied as int8 does.
  const bool fetch = T > 2 || sizeof(typename W::Type) == 1;
  for (int64_t groups = (n + most - 1) / most, r = 0, count; groups > 0; --groups, r += count) {
    count = (n - r + groups - 1) / groups;
    dots_rows<W, slim ? kAhead : 4>(count, rows + r, x, column, T, D, out + r * stride, stride, fetch);
  }
}

}  // namespace
