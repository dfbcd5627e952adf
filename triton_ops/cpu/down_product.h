// The down projection of many tokens as one product: y [T, D] = h [T, F] times rows [F, D], over the neurons that are
// active for any token. The sum of a token depends on the other tokens only through the list of these.
#pragma once

#include "gemm.h"

namespace {

template <class W>
struct Linear {
  typedef typename W::Type Type;
  static constexpr int64_t kColumns = 256;  // in a block of columns
  static constexpr int64_t kMarked = 512;   // neurons
  static constexpr int64_t kAsked = 32;     // tokens
  static constexpr int64_t kAlone = 1 << 18;  // values of h that are looked at faster than other threads are woken

  const Type *h, *w, *bias;  // bias may be null
  Type* y;
  int64_t T, D, F, stride;
  // Set by carve().
  uint8_t* any;    // [F]
  int32_t* index;  // [F + 1]
  Gemm<W> gemm;    // its K, the number of active neurons, is set by find()

  void mark(int64_t begin) const {
    const int64_t n = F - begin < kMarked ? F - begin : kMarked;
    typename W::Magnitude seen[kMarked] = {};  // not in place, so that compilers see that nothing is read after a change
    // With many tokens all neurons are soon known to be active.
    bool all = false;
    for (int64_t t = 0; t < T && !all; ++t) {
      for (int64_t i = 0; i < n; ++i) seen[i] |= W::magnitude(h[t * F + begin + i]);
      if (t % Gemm<W>::kTokens == Gemm<W>::kTokens - 1) {
        int32_t count = 0;
        for (int64_t i = 0; i < n; ++i) count += seen[i] != 0;
        all = count == n;
      }
    }
    for (int64_t i = 0; i < n; ++i) any[begin + i] = seen[i] != 0;
  }

  // Lists the active neurons, and once more the last, which fills up the last step.
  int64_t list() const {
    int64_t n = 0;
    for (int64_t f = 0; f < F; ++f) {
      index[n] = int32_t(f);
      n += any[f];
    }
    index[n] = n ? index[n - 1] : 0;
    return n;
  }

  // Bias and rounding of columns begin … end - 1, whose sums are in the order of gemm.run().
  void finish(int64_t begin, int64_t end, const float* sum) const {
    for (int64_t i = begin; i < end; i += kStep, sum += T * kStep) {
      const int64_t n = std::min(end - i, kStep);
      Vec check = {};
      for (int64_t t = 0; t < T; ++t) {
        Vec a = {}, b = {};
        if (gemm.K) Float32::load(sum + t * kStep, a, b);
        check += not_finite(a, b);
        put(t, i, n, a, b);
      }
      // An infinite weight of a neuron that is silent for a token has become NaN there.
      if (::sum(check) == 0.0f) continue;
      for (int64_t t = 0; t < T; ++t) {
        Vec a, b;
        Float32::load(sum + t * kStep, a, b);
        if (::sum(not_finite(a, b)) == 0.0f) continue;
        exactly(t, i, n, a, b);
        put(t, i, n, a, b);
      }
    }
  }

  // Zeros, but for NaN in the place of an infinity or a NaN.
  static Vec not_finite(Vec a, Vec b) { return 0.0f * a + 0.0f * b; }

  void put(int64_t t, int64_t i, int64_t n, Vec a, Vec b) const {
    store_with_bias<W>(a, b, bias ? bias + i : nullptr, n, y + t * D + i);
  }

  // The sums of one token and the n columns from i, of only the rows that this token needs.
  void exactly(int64_t t, int64_t i, int64_t n, Vec& a, Vec& b) const {
    a = b = Vec{};
    for (int64_t j = 0; j < gemm.K; ++j) {
      const float value = W::widen(h[t * F + index[j]]);
      if (value == 0.0f) continue;
      Type row[kStep] = {};
      std::memcpy(row, w + index[j] * stride + i, n * sizeof(Type));
      Vec wa, wb;
      W::load(row, wa, wb);
      a += value * wa;
      b += value * wb;
    }
  }

  // Finds the active neurons, which run() needs. Returns how many a token has; of many tokens a few are asked.
  double find(int threads) {
    const int64_t marks = (F + kMarked - 1) / kMarked, asked = std::min(T, kAsked);
    std::atomic<int64_t> active{0};
    Pieces pieces(marks + asked);
    together(T * F < kAlone ? 1 : threads, [&](Worker&) {
      pieces.share([&](int64_t i) {
        if (i < marks)
          mark(i * kMarked);
        else
          active.fetch_add(count(h + (i - marks) * T / asked * F), std::memory_order_relaxed);
      });
    });
    gemm.K = list();
    return double(active.load()) / double(asked);
  }

  // Of the values of one token those that are not zero.
  int64_t count(const Type* token) const {
    int32_t n = 0;
    for (int64_t f = 0; f < F; ++f) n += W::magnitude(token[f]) != 0;
    return n;
  }

  void run(int threads) const {
    const Across<W> rows = {w, stride};
    std::atomic<int64_t> next{0};
    Pieces inputs(gemm.blocks());
    together(threads, [&](Worker& me) {
      inputs.share([&](int64_t block) { gemm.pack_inputs(block); });
      const auto take = [&] { return std::min(gemm.columns * next.fetch_add(1), D); };
      const auto end_of = [&](int64_t begin) { return std::min(begin + gemm.columns, D); };
      float* const sums = gemm.sums(me.index);
      int64_t begin = take(), after;
      inputs.wait(me);
      for (; begin < D; begin = after) {
        after = -1;
        const auto ahead = [&](int64_t calls) {
          after = take();
          return rows.ahead(index, gemm.rows_in(0), after, end_of(after), calls);
        };
        gemm.run(rows, begin, end_of(begin), ahead, sums, gemm.panels(me.index));
        finish(begin, end_of(begin), sums);
        if (after < 0) after = take();  // without any active neuron
      }
    });
  }

  // Gives out the scratch memory; returns its size in bytes. With null it only counts.
  int64_t carve(char* scratch, int threads) {
    Carver take{scratch};
    take(any, F);
    take(index, F + 1);
    gemm.x = h, gemm.T = T, gemm.width = F, gemm.index = index;
    // As many blocks for each thread.
    const int64_t blocks = ((D + kColumns - 1) / kColumns + threads - 1) / threads * threads;
    gemm.carve(take, ((D + blocks - 1) / blocks + kStep - 1) / kStep * kStep, threads);
    return take.at - scratch;
  }
};

}  // namespace
