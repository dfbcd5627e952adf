// Of the outputs of a linear layer, for a few tokens, those that may be a token's largest; the others are -infinity.
//
// The int8 row of every output and its bounds (certify.h) say between what its value lies. Where the most that it can
// be is less than the least that some other one can be, it is not the largest, and its row is not read. triton_ops/
// certificate.py has the proof, for either side; the bias and rounding are monotone, so that outputs which are equal
// once they are rounded stay side by side, and argmax finds the first of them, as without this.
#pragma once

#include "certify.h"
#include "dots.h"
#include "team.h"

namespace {

template <class W>
struct GreedyLinear {
  typedef typename W::Type Type;
  typedef typename Product<W>::In In;
  static constexpr int64_t kTokens = kFewTokens;  // at most
  static constexpr int64_t kBlock = 64;  // rows whose products are kept before they become bounds
  const Type *x, *bias;     // [T, F], [D] or null
  const Type* w;            // [D, F] with contiguous rows
  const int8_t* q;          // [D, F]
  const float* bounds;      // [D, 3]
  Type* y;                  // [T, D]
  int64_t T, D, F, stride;  // between rows of w
  // Set by carve().
  In* inputs;     // [T, padded(F)]
  int16_t* k;     // [T, F]
  float* least;   // [pieces, T], of a piece the largest of the least values
  int64_t size, count;  // rows of a piece, pieces
  // Set by run().
  Quantised quantised[kTokens];

  float bias_of(int64_t row) const { return bias ? W::widen(bias[row]) : 0.0f; }

  // What each output can be at most goes to y.
  void bound_rows(int64_t begin, int64_t end, float* best) const {
    double products[kBlock];
    for (int64_t t = 0; t < T; ++t) best[t] = -INFINITY;
    for (int64_t first = begin, n; first < end; first += n) {
      n = std::min(kBlock, end - first);
      for (int64_t t = 0; t < T; ++t) {
        for (int64_t j = 0; j < n; ++j) products[j] = double(int8_dot(q + (first + j) * F, k + t * F, F));
        for (int64_t j = 0; j < n; ++j) {
          const int64_t row = first + j;
          const Between own = between(bounds + 3 * row, products[j], quantised[t]);
          y[t * D + row] = W::narrow(own.most + bias_of(row));
          const float least = rounded<W>(own.least + bias_of(row));
          best[t] = least > best[t] ? least : best[t];  // NaN is none
        }
      }
    }
  }

  void compute_rows(int64_t begin, int64_t end, const float* best) const {
    for (int64_t t = 0; t < T; ++t) {
      const In* const input = inputs + t * padded(F);
      for (int64_t row = begin; row < end; ++row) {
        Type& out = y[t * D + row];
        if (W::widen(out) < best[t]) {
          out = W::narrow(-INFINITY);
          continue;
        }
        const Type* const rows[2] = {w + row * stride, w + row * stride};
        float product;
        dots<W, 1, 1, false>(rows, &input, F, &product);
        out = W::narrow(product + bias_of(row));
      }
    }
  }

  void run(int threads) {
    for (int64_t t = 0; t < T; ++t) {
      Product<W>::template prepare<W>(x + t * F, inputs + t * padded(F), F);
      quantised[t] = quantise<W>(x + t * F, k + t * F, F);
    }
    Pieces first(count), second(count);
    together(int(std::min(count, int64_t(threads))), [&](Worker& me) {
      first.share([&](int64_t i) { bound_rows(i * size, std::min((i + 1) * size, D), least + i * T); });
      first.wait(me);
      float best[kTokens];
      std::copy(least, least + T, best);
      for (int64_t i = T; i < count * T; ++i) best[i % T] = std::max(best[i % T], least[i]);
      second.share([&](int64_t i) { compute_rows(i * size, std::min((i + 1) * size, D), best); });
    });
  }

  // Gives out the scratch memory; returns its size in bytes. With null it only counts.
  int64_t carve(char* scratch, int threads) {
    size = rows_of_piece(F, D, threads);
    count = (D + size - 1) / size;
    Carver take{scratch};
    take(inputs, T * padded(F));
    take(k, T * F);
    take(least, count * T);
    return take.at - scratch;
  }
};

}  // namespace
