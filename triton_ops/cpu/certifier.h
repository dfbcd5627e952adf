// Makes a certificate, the int8 rows of a weight and their bounds, at the speed at which the weight is read;
// triton_ops/certificate.py says what they are.
#pragma once

#include "certify.h"
#include "dots.h"
#include "team.h"

namespace {

template <class W>
struct Certifier {
  typedef typename W::Type Type;
  static constexpr int64_t kChunk = 256;  // elements whose squares are summed in float32
  const Type* w;            // [D, F] with contiguous rows
  int8_t* q;                // [D, F]
  float* bounds;            // [D, 3]
  int64_t D, F, stride;

  void certify_row(const Type* row, int8_t* out, float* own) const {
    const typename W::Magnitude magnitude = largest_magnitude<W>(row, F);
    Type bits;
    std::memcpy(&bits, &magnitude, sizeof bits);
    const float largest = W::widen(bits);
    const float scale = float(double(largest) / 127);
    float *const s = own, *const r = own + 1, *const m = own + 2;
    if (!(largest <= 3.4028234e38f && scale >= 1.17549435e-38f)) {  // a processor may take smaller ones as zero
      std::memset(out, 0, F);
      *s = 0.0f;
      *r = *m = largest <= 3.4028234e38f ? next_up(float(largest * std::sqrt(double(F)))) : INFINITY;
      return;
    }
    // In parts of the scale, where no square underflows or overflows.
    const float inverse = 1.0f / scale;
    double residual = 0.0, norm = 0.0;
    for (int64_t begin = 0; begin < F; begin += kChunk) {
      const int64_t end = std::min(begin + kChunk, F);
      float e2 = 0.0f, w2 = 0.0f;
#pragma omp simd reduction(+ : e2, w2)
      for (int64_t i = begin; i < end; ++i) {
        const float v = W::widen(row[i]) * inverse, near = (v + kWhole) - kWhole, e = v - near;
        out[i] = int8_t(int32_t(near));
        e2 += e * e, w2 += v * v;
      }
      residual += e2, norm += w2;
    }
    // A sum of kChunk squares is off by 2 kChunk roundings at most, and v by three.
    const double up = 1.0 + 2.0 * kChunk * 0x1p-24, all = scale * std::sqrt(norm * up) * (1.0 + 0x1p-21);
    *s = scale;
    *r = next_up(float(scale * std::sqrt(residual * up) + 0x1p-21 * all));
    *m = next_up(float(all));
  }

  void run(int threads) const {
    const int64_t size = rows_of_piece(F * int64_t(sizeof(Type)), D, threads);
    const int64_t count = (D + size - 1) / size;
    Pieces pieces(count);
    together(int(std::min(count, int64_t(threads))), [&](Worker&) {
      pieces.share([&](int64_t i) {
        for (int64_t row = i * size; row < std::min((i + 1) * size, D); ++row)
          certify_row(w + row * stride, q + row * F, bounds + 3 * row);
      });
    });
  }
};

}  // namespace
