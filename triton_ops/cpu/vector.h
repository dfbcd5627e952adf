// Vectors of the machine, and the dtypes of the weights as pairs of float vectors.
//
// Portable: GCC and Clang vector extensions, as wide as the target has them; intrinsics only where a conversion
// has no other fast form.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
constexpr int kLanes = kBytes / 4;
constexpr int kLaneBits = kLanes == 16 ? 4 : kLanes == 8 ? 3 : 2;
constexpr int64_t kStep = 2 * kLanes;  // elements that one load() turns into two float vectors
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr bool kManyRegisters = true;  // 32 vectors; else 16
#else
constexpr bool kManyRegisters = false;
#endif

typedef float Vec __attribute__((vector_size(kBytes)));
typedef uint32_t Bits __attribute__((vector_size(kBytes)));
typedef int32_t Mask __attribute__((vector_size(kBytes)));
// Rows of odd length start at any element, hence the relaxed alignment.
typedef float VecLoose __attribute__((vector_size(kBytes), aligned(4), may_alias));
typedef uint32_t BitsLoose __attribute__((vector_size(kBytes), aligned(2), may_alias));

inline float as_float(uint32_t u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

constexpr float kWhole = 12582912.0f;  // from there on floats are whole numbers

inline uint32_t as_bits(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return u;
}

// A hardware prefetcher stops at the end of a page, which is about one row: rows to come are asked for by hand,
// a fifth faster on one core.
template <class Type>
void fetch(const Type* p, int64_t bytes) {
  for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(reinterpret_cast<const char*>(p) + b);
}

// kLanes neighbouring elements, in their order.
template <class W>
Vec widened(const typename W::Type* p) {
  Vec v;
  for (int i = 0; i < kLanes; ++i) v[i] = W::widen(p[i]);
  return v;
}

struct Float32 {
  typedef float Type;
  static Vec lanes(const float* p) { return *reinterpret_cast<const VecLoose*>(p); }
  static void load(const float* p, Vec& a, Vec& b) {
    a = lanes(p), b = lanes(p + kLanes);
  }
  static void store(float* p, Vec a, Vec b) {
    *reinterpret_cast<VecLoose*>(p) = a;
    *reinterpret_cast<VecLoose*>(p + kLanes) = b;
  }
  static Vec round(Vec v) { return v; }  // to this dtype and back
  typedef uint32_t Magnitude;  // bits that are 0 just for zeros
  static uint32_t magnitude(float v) { return as_bits(v) & 0x7fffffffu; }
  static float widen(float v) { return v; }
  static float narrow(float v) { return v; }
  static int64_t place(int64_t i) { return i; }  // of element i in the two vectors of load()
};

// Two neighbouring bfloat16 share a 32-bit lane: the even elements become vector a, the odd ones b.
struct BFloat16 {
  typedef uint16_t Type;
  static Vec lanes(const uint16_t* p) { return widened<BFloat16>(p); }
  static void load(const uint16_t* p, Vec& a, Vec& b) {
    const Bits v = *reinterpret_cast<const BitsLoose*>(p);
    a = reinterpret_cast<Vec>(v << 16);
    b = reinterpret_cast<Vec>(v & 0xffff0000u);
  }
  static Vec round(Vec v) {  // to nearest even; NaN stays NaN
    const Bits u = reinterpret_cast<Bits>(v);
    const Bits nearest = u + 0x7fffu + ((u >> 16) & 1u);
    const Mask is_nan = v != v;
    return reinterpret_cast<Vec>((is_nan ? reinterpret_cast<Mask>(u | 0x400000u) : reinterpret_cast<Mask>(nearest)) &
                                 int32_t(0xffff0000u));
  }
  static void store(uint16_t* p, Vec a, Vec b) {
    *reinterpret_cast<BitsLoose*>(p) = (reinterpret_cast<Bits>(round(a)) >> 16) | reinterpret_cast<Bits>(round(b));
  }
  typedef uint16_t Magnitude;
  static uint16_t magnitude(uint16_t v) { return v & 0x7fffu; }
  static int64_t place(int64_t i) { return i / 2 + i % 2 * kLanes; }
  static float widen(uint16_t v) { return as_float(uint32_t(v) << 16); }
  static uint16_t narrow(float f) {
    const uint32_t u = as_bits(f);
    if (f != f) return uint16_t((u | 0x400000u) >> 16);
    return uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
  }
};

struct Float16 {
  typedef uint16_t Type;
  static int64_t place(int64_t i) { return i; }
  static void load(const uint16_t* p, Vec& a, Vec& b) { a = lanes(p), b = lanes(p + kLanes); }
  typedef uint16_t Magnitude;
  static uint16_t magnitude(uint16_t v) { return v & 0x7fffu; }
#if defined(__AVX512F__)
  static Vec lanes(const uint16_t* p) { return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
  static void store(uint16_t* p, Vec a, Vec b) {
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)a, _MM_FROUND_TO_NEAREST_INT));
    _mm256_storeu_si256((__m256i*)(p + kLanes), _mm512_cvtps_ph((__m512)b, _MM_FROUND_TO_NEAREST_INT));
  }
  static Vec round(Vec v) {
    return (Vec)_mm512_cvtph_ps(_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
  }
#elif defined(__F16C__)
  static Vec lanes(const uint16_t* p) { return (Vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
  static void store(uint16_t* p, Vec a, Vec b) {
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)a, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128((__m128i*)(p + kLanes), _mm256_cvtps_ph((__m256)b, _MM_FROUND_TO_NEAREST_INT));
  }
  static Vec round(Vec v) {
    return (Vec)_mm256_cvtph_ps(_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
  }
#else
  static Vec lanes(const uint16_t* p) { return widened<Float16>(p); }
  static void store(uint16_t* p, Vec a, Vec b) {
    for (int i = 0; i < kLanes; ++i) p[i] = narrow(a[i]), p[kLanes + i] = narrow(b[i]);
  }
  static Vec round(Vec v) {
    for (int i = 0; i < kLanes; ++i) v[i] = widen(narrow(v[i]));
    return v;
  }
#endif
#if defined(__F16C__)
  static float widen(uint16_t v) { return _cvtsh_ss(v); }
  static uint16_t narrow(float f) { return _cvtss_sh(f, _MM_FROUND_TO_NEAREST_INT); }
#elif defined(__aarch64__)
  static float widen(uint16_t v) {
    __fp16 h;
    std::memcpy(&h, &v, 2);
    return h;
  }
  static uint16_t narrow(float f) {
    const __fp16 h = f;
    uint16_t v;
    std::memcpy(&v, &h, 2);
    return v;
  }
#else
  static float widen(uint16_t v) {
    const uint32_t sign = uint32_t(v & 0x8000u) << 16, rest = v & 0x7fffu;
    if (rest >= 0x7c00u) return as_float(sign | 0x7f800000u | (rest & 0x3ffu) << 13);  // infinity, NaN
    const float magnitude = rest < 0x400u ? float(rest) * 0x1p-24f : as_float((rest << 13) + 0x38000000u);
    return as_float(sign | as_bits(magnitude));
  }
  static uint16_t narrow(float f) {
    const uint32_t u = as_bits(f), sign = (u >> 16) & 0x8000u, rest = u & 0x7fffffffu;
    if (f != f) return uint16_t(sign | 0x7e00u | ((rest >> 13) & 0x3ffu));
    if (rest >= 0x477ff000u) return uint16_t(sign | 0x7c00u);  // 65520 and more round to infinity
    if (rest < 0x38800000u)  // subnormal: the addition rounds to a multiple of 2**-24, to nearest even
      return uint16_t(sign | (as_bits(as_float(rest) + 0.5f) - as_bits(0.5f)));
    return uint16_t(sign | ((rest - 0x38000000u + 0xfffu + ((rest >> 13) & 1u)) >> 13));
  }
#endif
};

// Rows of weights that are rounded to int8; each row has a scale, which is applied to its sums.
struct Int8 {
  typedef int8_t Type;
#if defined(__AVX512F__)
  static Vec lanes(const int8_t* p) {
    return (Vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
  }
#elif defined(__AVX2__)
  static Vec lanes(const int8_t* p) {
    return (Vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
  }
#else
  static Vec lanes(const int8_t* p) { return widened<Int8>(p); }
#endif
  static void load(const int8_t* p, Vec& a, Vec& b) { a = lanes(p), b = lanes(p + kLanes); }
  static float widen(int8_t v) { return v; }
};

// The dense computation rounds every pre-activation and every h to the dtype of the model; doing the same
// here makes both select the same neurons.
template <class W>
float rounded(float v) {
  return W::widen(W::narrow(v));
}

template <class W>
Vec rounded(Vec v) {
  return W::round(v);
}

inline float sum(Vec v) {
  float s[kLanes];
  std::memcpy(s, &v, sizeof v);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) s[i] += s[i + width];
  return s[0];
}

// Gives out pieces of a scratch memory, which may be null.
struct Carver {
  char* at;
  template <class T>
  void operator()(T*& pointer, int64_t n) {
    pointer = reinterpret_cast<T*>(at);
    at += (n * int64_t(sizeof(T)) + 63) / 64 * 64;
  }
};

inline int64_t padded(int64_t D) { return (D + kStep - 1) / kStep * kStep; }

}  // namespace
