// What reaches the down projection, for many tokens: h [T, F] = act(x gate) * (x up).
//
// A thread makes a block of neurons: the gate as a product of matrices; then the up projection as another, or, if few
// pairs of token and neuron are active, one dot product for each. Blocks are the same for any number of threads, for
// the two differ in the order of additions.
#pragma once

#include "one_pass.h"
#include "gemm.h"

namespace {

template <class W>
struct Hidden {
  typedef typename W::Type Type;
  static constexpr int64_t kColumns = 128;  // in a block; with more their rows would crowd each other out of the cache
  static constexpr int64_t kTogether = 64;  // tokens whose dot products with one row are made together
  static constexpr double kDensity = 0.25;  // share of active pairs of a block below which dot products are faster
  const Type *x, *gate, *up, *gate_bias, *up_bias;  // up null: a plain MLP; biases may be null
  Type* h;                                          // [T, F]
  int64_t T, D, F, gate_stride, up_stride;
  int kind;
  float threshold;
  const Type* thresholds;  // [F], or null: `threshold` for all
  // Set by carve().
  int32_t* all;     // 0, 1, 2, …
  Type* activated;  // [threads, columns, T]
  typename Product<W>::In* rows;  // [T, padded(D)]: inputs of dot products
  Gemm<W> gemm;

  static Vec kept(Vec value, Mask on) { return (Vec)((Bits)value & (Bits)on); }

  template <class Activation>
  static Vec apply(Activation, Vec p, Vec parameter) {
    return kept(Activation::template value<W>(p, parameter), ~Activation::template silent<W>(p, parameter));
  }

  // The activated gates of a block of neurons, from their sums and in the same order. Returns how many are active, those
  // that fill up the last step included.
  int64_t activate(int64_t begin, int64_t end, const float* sums, Type* held) const {
    Mask active_a = {}, active_b = {};
    activations::Table::select(kind, [&](auto activation) {
      for (int64_t i = begin; i < end; i += kStep) {
        Vec limit_a = Vec{} + (thresholds ? 0.0f : threshold), limit_b = limit_a;
        add_bias<W>(limit_a, limit_b, thresholds ? thresholds + i : nullptr, std::min(end - i, kStep));
        for (int64_t t = 0; t < T; ++t, sums += kStep, held += kStep) {
          Vec a, b;
          Float32::load(sums, a, b);
          add_bias<W>(a, b, gate_bias ? gate_bias + i : nullptr, std::min(end - i, kStep));
          a = apply(activation, rounded<W>(a), limit_a), b = apply(activation, rounded<W>(b), limit_b);
          active_a -= a != 0.0f, active_b -= b != 0.0f;
          W::store(held, a, b);
        }
      }
    });
    active_a += active_b;
    int64_t count = 0;
    for (int i = 0; i < kLanes; ++i) count += active_a[i];
    return count;
  }

  // Times the up projection, whose sums these are.
  void times_up(int64_t begin, int64_t end, const float* sums, Type* held) const {
    const Mask relu_up = Mask{} - activations::relu_up(kind);
    for (int64_t i = begin; i < end; i += kStep)
      for (int64_t t = 0; t < T; ++t, sums += kStep, held += kStep) {
        Vec a, b, ha, hb;
        Float32::load(sums, a, b);
        W::load(held, ha, hb);
        add_bias<W>(a, b, up_bias ? up_bias + i : nullptr, std::min(end - i, kStep));
        a = rounded<W>(a), b = rounded<W>(b);
        a = kept(ha * a, (ha != 0.0f) & ~(relu_up & (a <= 0.0f)));
        b = kept(hb * b, (hb != 0.0f) & ~(relu_up & (b <= 0.0f)));
        W::store(held, a, b);
      }
  }

  // Times the up projection, of active pairs alone.
  void times_up_of_pairs(int64_t begin, int64_t end, Type* held) const {
    for (int64_t first = 0; first < T; first += kTogether)
      for (int64_t i = begin; i < end; i += kStep) {
        Type* const own = held + ((i - begin) / kStep * T + first) * kStep;
        const int64_t tokens = std::min(T - first, kTogether), n = std::min(end - i, kStep);
        int32_t list[kStep][kTogether], count[kStep] = {};
        for (int32_t t = 0; t < tokens; ++t)
          for (int64_t j = 0; j < kStep; ++j)
            list[j][count[j]] = t, count[j] += W::magnitude(own[t * kStep + j]) != 0;
        for (int64_t j = 0; j < n; ++j) {
          int64_t next = j + 1;  // whose row is fetched meanwhile
          while (next < n && !count[next]) ++next;
          const Type* const row = up + (i + j) * up_stride;
          const Type* const both[] = {row, up + (i + next) * up_stride};
          times_up_of_neuron(both, i + j, list[j], count[j], rows + first * padded(D), own + j, first == 0 && next < n);
        }
      }
  }

  // The same for one neuron and the listed tokens; fetch: row[1] as well.
  void times_up_of_neuron(const Type* const* row, int64_t neuron, const int32_t* list, int32_t count,
                          const typename Product<W>::In* inputs, Type* held, bool fetch) const {
    const typename Product<W>::In* in[kTogether];
    int32_t column[kTogether];
    float products[kTogether], value[kTogether];
    for (int32_t k = 0; k < count; ++k) {
      in[k] = inputs + list[k] * padded(D);
      column[k] = k;
      value[k] = W::widen(held[list[k] * kStep]);
    }
    dots_inputs<W, 1>(row, in, column, count, D, products, 1, fetch);
    multiply<W>(products, up_bias ? W::widen(up_bias[neuron]) : 0.0f, activations::relu_up(kind), count, value);
    for (int32_t k = 0; k < count; ++k) held[list[k] * kStep] = W::narrow(value[k]);
  }

  void write(int64_t begin, int64_t end, const Type* held) const {
    for (int64_t i = begin; i < end; i += kStep)
      for (int64_t t = 0; t < T; ++t, held += kStep)
        std::memcpy(h + t * F + i, held, std::min(end - i, kStep) * sizeof(Type));
  }

  void run(int threads) {
    const Along<W> first = {gate, gate_stride, all}, second = {up, up_stride, all};
    for (int64_t i = 0; i <= std::max(D, F); ++i) all[i] = int32_t(i);
    std::atomic<int64_t> next{0};
    const int64_t blocks = gemm.blocks();
    Pieces inputs(blocks + (up ? T : 0));
    together(threads, [&](Worker& me) {
      inputs.share([&](int64_t i) {
        if (i < blocks) return gemm.pack_inputs(i);
        Product<W>::template prepare<W>(x + (i - blocks) * D, rows + (i - blocks) * padded(D), D);
      });
      const auto take = [&] { return std::min(gemm.columns * next.fetch_add(1), F); };
      const auto end_of = [&](int64_t begin) { return std::min(begin + gemm.columns, F); };
      float* const sums = gemm.sums(me.index);
      Type* const held = activated + me.index * gemm.columns * T;
      int64_t begin = take(), after;
      inputs.wait(me);
      for (; begin < F; begin = after) {
        const int64_t end = end_of(begin);
        const auto ahead_next = [&](int64_t calls) {
          after = take();
          return first.ahead(all, gemm.rows_in(0), after, end_of(after), calls);
        };
        const auto ahead_up = [&](int64_t calls) {
          return up ? second.ahead(all, gemm.rows_in(0), begin, end, calls) : ahead_next(calls);
        };
        gemm.run(first, begin, end, ahead_up, sums, gemm.panels(me.index));
        const int64_t active = activate(begin, end, sums, held);
        if (up && active < kDensity * double(T * padded(end - begin))) {
          times_up_of_pairs(begin, end, held);
          after = take();
        } else if (up) {
          gemm.run(second, begin, end, ahead_next, sums, gemm.panels(me.index));
          times_up(begin, end, sums, held);
        }
        write(begin, end, held);
      }
    });
  }

  // Gives out the scratch memory; returns its size in bytes. With null it only counts.
  int64_t carve(char* scratch, int threads) {
    Carver take{scratch};
    take(all, std::max(D, F) + 1);
    gemm.x = x, gemm.T = T, gemm.width = gemm.K = D, gemm.index = all;
    gemm.carve(take, kColumns, threads);
    take(activated, threads * gemm.columns * T);
    take(rows, up ? T * padded(D) : 0);
    return take.at - scratch;
  }
};

}  // namespace
