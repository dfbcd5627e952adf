// The down projection of a block of neurons: weighted rows added to float32 outputs.
#pragma once

#include "vector.h"

namespace {

// y (+)= h[0] * rows[0] + … + h[R-1] * rows[R-1] in columns begin … end - 1, added one after the other.
template <class W, int R>
void axpy(float* y, const typename W::Type* const* rows, const float* h, int64_t begin, int64_t end, bool fresh) {
  int64_t i = begin;
  for (; i + kStep <= end; i += kStep) {
    Vec ya = {}, yb = {};
    if (!fresh) Float32::load(y + i, ya, yb);
    for (int r = 0; r < R; ++r) {
      Vec a, b;
      W::load(rows[r] + i, a, b);
      ya += h[r] * a;
      yb += h[r] * b;
    }
    Float32::store(y + i, ya, yb);
  }
  for (; i < end; ++i) {
    float s = fresh ? 0.0f : y[i];
    for (int r = 0; r < R; ++r) s += h[r] * W::widen(rows[r][i]);
    y[i] = s;
  }
}

// The same for n rows. fresh: y holds nothing yet.
template <class W>
void add_rows(float* y, const typename W::Type* const* rows, const float* h, int64_t n, int64_t begin, int64_t end,
              bool fresh) {
  int64_t r = 0;
  for (; r + 8 <= n; r += 8, fresh = false) axpy<W, 8>(y, rows + r, h + r, begin, end, fresh);
  if (r + 4 <= n) axpy<W, 4>(y, rows + r, h + r, begin, end, fresh), r += 4, fresh = false;
  if (r + 2 <= n) axpy<W, 2>(y, rows + r, h + r, begin, end, fresh), r += 2, fresh = false;
  if (r < n) axpy<W, 1>(y, rows + r, h + r, begin, end, fresh);
}

constexpr int64_t kTileRows = 32;  // whose pages the processor can keep translated
constexpr int kTileTokens = 8;     // or half of them

// Several tokens at once, for blocks that most of them want, where the processor has more for it than float vectors.
template <class W>
struct Tile {
  static constexpr bool kExists = false;
};

#if defined(__AVX512BF16__)
template <>
struct Tile<BFloat16> {
  static constexpr bool kExists = true;

  // y[t * D + i] += sum over r of h[r, t] * rows[r][i] for N tokens and one step of columns. Two rows at a time, whose
  // bfloat16 products are exact and summed in float32: pairs[r / 2][t] holds h[r, t] and, above it, h[r + 1, t]. n is
  // even and at most kTileRows; next, unless null: rows that are needed next.
  // False, and y unchanged, where the result is not finite: an infinite weight times h = 0 is NaN.
  template <int N>
  static bool add(float* y, int64_t D, const uint16_t* const* rows, const uint16_t* const* next,
                  const uint32_t (*pairs)[N], int64_t n, int64_t i) {
    Vec even[N], odd[N], check = {};
    for (int t = 0; t < N; ++t) Float32::load(y + t * D + i, even[t], odd[t]);
    for (int64_t r = 0; r < n; r += 2) {
      const Bits f = *reinterpret_cast<const BitsLoose*>(rows[r] + i);
      const Bits g = *reinterpret_cast<const BitsLoose*>(rows[r + 1] + i);
      if (next) __builtin_prefetch(next[r] + i, 0, 2), __builtin_prefetch(next[r + 1] + i, 0, 2);
      const __m512bh low = (__m512bh)((f & 0xffffu) | (g << 16));
      const __m512bh high = (__m512bh)((f >> 16) | (g & 0xffff0000u));
      for (int t = 0; t < N; ++t) {
        const __m512bh both = (__m512bh)_mm512_set1_epi32(int32_t(pairs[r / 2][t]));
        even[t] = (Vec)_mm512_dpbf16_ps((__m512)even[t], low, both);
        odd[t] = (Vec)_mm512_dpbf16_ps((__m512)odd[t], high, both);
      }
    }
    for (int t = 0; t < N; ++t) check += 0.0f * even[t] + 0.0f * odd[t];
    if (sum(check) != 0.0f) return false;
    for (int t = 0; t < N; ++t) Float32::store(y + t * D + i, even[t], odd[t]);
    return true;
  }
};
#endif

}  // namespace
