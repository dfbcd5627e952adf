// The dense products of a few tokens with the weights of some nn.Linear: y [T, D] = x [T, F] Wᵀ + bias, in dtype W. The
// rows of a weight are of the same dtype, or int8 with a scale each.
//
// Time is bytes of weights read / bandwidth, so they are read once for all tokens. Threads take pieces of rows of W in
// any order. The bits of an output depend on its row and its token alone: neither on threads nor on other tokens or
// weights.
#pragma once

#include "dots.h"
#include "team.h"

namespace {

template <class W, class Rows = W>
struct DenseLinear {
  typedef typename W::Type Type;
  typedef typename Rows::Type Row;
  struct Layer {
    const Row* w;          // [D, F] with contiguous rows
    const Type* bias;      // [D] or null
    const float* scales;   // [D], or null: 1
    Type* y;               // [T, D]
    int64_t D, stride;     // between rows
    int64_t size, first;   // set by run(): rows of a piece, and the number of its first piece
  };
  typedef typename Product<Rows>::In In;
  static constexpr int64_t kTokens = kFewTokens;  // at most
  static constexpr int64_t kBlock = 64;              // rows whose sums are kept before they are rounded
  // Bytes of inputs that stay in the first-level cache beside the weights that pass. Larger ones are read from the next
  // with every row, so four rows share them; rows of few inputs are read fastest one by one.
  static constexpr int64_t kNear = 12 * 1024;
  const Type* x;  // [T, F]
  Layer layers[kLinears];
  int64_t count, T, F;  // of layers, 1 or more
  // Set by carve().
  In* inputs;  // [T, padded(F)]
  // Set by run().
  const In* input[kTokens];
  int32_t column[kTokens];
  float factors[kTokens];

  void run_rows(const Layer& of, int64_t begin, int64_t end) const {
    const bool one_by_one = T * padded(F) * int64_t(sizeof(In)) <= kNear;
    const Row* rows[kBlock + kAhead];
    float products[kBlock * kTokens];
    for (int64_t first = begin, n; first < end; first += n) {
      n = std::min(kBlock, end - first);
      for (int64_t j = 0; j < n + kAhead; ++j) rows[j] = of.w + std::min(first + j, of.D - 1) * of.stride;
      all_dots<Rows>(rows, n, input, column, T, F, products, T, one_by_one);
      times_scales(products, of.scales ? of.scales + first : nullptr, factors, nullptr, n, T);
      for (int64_t j = 0; j < n; ++j) {
        const float b = of.bias ? W::widen(of.bias[first + j]) : 0.0f;
        for (int64_t t = 0; t < T; ++t) of.y[t * of.D + first + j] = W::narrow(products[j * T + t] + b);
      }
    }
  }

  void run(int threads) {
    for (int64_t t = 0; t < T; ++t) {
      factors[t] = Product<Rows>::template prepare<W>(x + t * F, inputs + t * padded(F), F);
      input[t] = inputs + t * padded(F);
      column[t] = int32_t(t);
    }
    int64_t all = 0;
    for (Layer& of : *this) {
      of.size = rows_of_piece(F * int64_t(sizeof(Row)), of.D, threads), of.first = all;
      all += (of.D + of.size - 1) / of.size;
    }
    Pieces pieces(all);
    together(int(std::min(all, int64_t(threads))), [&](Worker&) {
      pieces.share([&](int64_t i) {
        const Layer* of = end() - 1;
        while (i < of->first) --of;
        const int64_t row = (i - of->first) * of->size;
        run_rows(*of, row, std::min(row + of->size, of->D));
      });
    });
  }

  Layer* begin() { return layers; }
  Layer* end() { return layers + count; }

  // Gives out the scratch memory; returns its size in bytes. With null it only counts.
  int64_t carve(char* scratch, int) {
    Carver take{scratch};
    take(inputs, T * padded(F));
    return take.at - scratch;
  }
};

}  // namespace
