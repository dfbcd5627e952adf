// One pass over the neurons of an MLP: gate dot product, activation test, and only for active neurons the up
// dot product and the addition of the down row to the output. What silent neurons own is not read.
//
// Weights are streamed once and everything else stays in cache, so time is bytes of weights read / bandwidth.
//
// Deterministic: F is cut into fixed groups (independent of the numbers of threads and tokens); threads take whole
// groups in any order, each group sums its neurons in order into its own partial output, and partial outputs are
// added in order. Nor does the sum of a token depend on which other tokens are in the call.
#pragma once

#include "activation.h"
#include "add_rows.h"
#include "certify.h"
#include "dots.h"
#include "team.h"
#include "vector.h"

namespace {

constexpr int64_t kMaxBlock = 512;   // neurons whose gates are computed before any up row is read
constexpr int64_t kBatchBlock = 128; // the same for more than one token, whose working set must stay in cache
constexpr int64_t kMinGroup = 128;   // neurons; the last groups are small so that no thread waits long
constexpr int64_t kGroupShare = 8;
constexpr int64_t kUnionTokens = 8;  // up to here an up row is multiplied by all tokens if any needs it
constexpr int64_t kMaxValues = kMaxBlock > kBatchBlock * kMaxTokens ? kMaxBlock : kBatchBlock * kMaxTokens;

// value or zero, without a branch, also where a compiler would rather have one.
inline float kept(float value, bool on) { return as_float(as_bits(value) & (0u - uint32_t(on))); }

// The activated gate of one neuron for T tokens from its dot products; whether any is active. Without branches on the
// values, which no processor could predict.
template <class W, class Activation>
bool activate(Activation, const float* products, float bias, float threshold, int64_t T, float* h) {
  int32_t any = 0;
  for (int64_t t = 0; t < T; ++t) {
    const float p = rounded<W>(products[t] + bias), value = Activation::template value<W>(p, threshold);
    const bool on = !Activation::template silent<W>(p, threshold);
    h[t] = kept(value, on);
    any |= on;
  }
  return any;
}

// h *= up for one neuron and T tokens, where h is not zero; products elsewhere may be anything.
template <class W>
void multiply(const float* products, float bias, bool relu_up, int64_t T, float* h) {
  for (int64_t t = 0; t < T; ++t) {
    const float v = rounded<W>(products[t] + bias), value = rounded<W>(h[t] * v);
    h[t] = kept(value, (h[t] != 0.0f) & !(relu_up & (v <= 0.0f)));
  }
}

// End of the group that starts at neuron `begin`: a fixed share of what is left, within limits.
int64_t group_end(int64_t begin, int64_t F) {
  const int64_t left = F - begin;
  int64_t size = (left / kGroupShare + kMinGroup - 1) / kMinGroup * kMinGroup;
  size = size < kMinGroup ? kMinGroup : size > kMaxBlock ? kMaxBlock : size;
  return size < left ? begin + size : F;
}

int64_t count_groups(int64_t F) {
  int64_t n = 0;
  for (int64_t begin = 0; begin < F; begin = group_end(begin, F)) ++n;
  return n;
}

// Values are of dtype W; so are the rows of the weights, or they are int8 with a scale each.
template <class W, class Rows = W>
struct Fused {
  typedef typename W::Type Type;
  typedef typename Rows::Type Row;
  typedef typename Product<Rows>::In In;
  const Type *x, *gate_bias, *up_bias, *down_bias;
  const Row *gate, *up, *down;                                         // gate null: x is h; up null: a plain MLP
  const float *gate_scales, *up_scales, *down_scales;                  // [F], [F], [D], or null: 1
  const int8_t* q;                                                     // null: no certificate; [F, D]
  const float* bounds;                                                 // [F, 3]
  Type* y;
  bool stores;   // h goes to hidden [T, F], and nothing to y
  bool all;      // without a gate: no neuron is silent, also where h is 0
  Type* hidden;
  int64_t T, D, F, gate_stride, up_stride, down_stride;
  int kind;
  float threshold;
  const Type* thresholds;  // [F], or null: `threshold` for all
  // Set by carve().
  int64_t groups;
  int64_t* begins;           // [groups + 1]
  In* inputs;                // [T, padded(D)]
  int16_t* k;                // [D]
  float* partial;            // [groups, T, D]
  int32_t* written;          // [groups, T]
  // Set by run().
  const In* input[kMaxTokens];
  int32_t column[kMaxTokens];
  float factors[kMaxTokens];
  Quantised quantised;

  static float bias(const Type* biases, int64_t f) { return biases ? W::widen(biases[f]) : 0.0f; }

  float threshold_of(int64_t f) const { return thresholds ? W::widen(thresholds[f]) : threshold; }

  // The neurons of a block that are not certified to be silent.
  int64_t uncertified(int64_t begin, int64_t n, int32_t* index) const {
    float p[kMaxBlock];
    for (int64_t i = 0; i < n; ++i) {
      // What is done here to the bound is done below to the dot product; each step is monotone.
      const int64_t f = begin + i, product = int8_dot(q + f * D, k, D);
      p[i] = rounded<W>(between(bounds + 3 * f, double(product), quantised).most + bias(gate_bias, f));
    }
    int64_t count = 0;
    activations::Table::select(kind, [&](auto activation) {
      for (int64_t i = 0; i < n; ++i)
        if (!activation.template silent<W>(p[i], threshold_of(begin + i))) index[count++] = int32_t(i);
    });
    return count;
  }

  // h of neurons begin … begin + n - 1 into h[i * T + t].
  void compute_block(int64_t begin, int64_t n, float* h) const {
    const Row* rows[kMaxBlock + kAhead];
    float products[kMaxValues];
    int32_t index[kMaxBlock] = {0};
    int64_t count = n;
    if (q) {
      count = uncertified(begin, n, index);
      std::memset(h, 0, n * T * sizeof *h);
    } else {
      for (int64_t i = 0; i < n; ++i) index[i] = int32_t(i);
    }
    for (int64_t j = 0; j < count; ++j) rows[j] = gate + (begin + index[j]) * gate_stride;
    for (int64_t j = 0; j < kAhead; ++j) {
      const int64_t next = q ? begin + index[j < count ? j : 0] : begin + n + j < F ? begin + n + j : F - 1;
      rows[count + j] = gate + (count ? next : begin) * gate_stride;
    }
    all_dots<Rows>(rows, count, input, column, T, D, products, T, count == n);
    times_scales(products, gate_scales ? gate_scales + begin : nullptr, factors, index, count, T);
    int64_t active = 0;
    activations::Table::select(kind, [&](auto activation) {
      for (int64_t j = 0; j < count; ++j) {
        const int64_t i = index[j];
        const float b = bias(gate_bias, begin + i), t = threshold_of(begin + i);
        if (activate<W>(activation, products + j * T, b, t, T, h + i * T)) index[active++] = int32_t(i);
      }
    });
    if (up) times_up(begin, n, index, active, h);
  }

  // h *= up projection, for the listed neurons of a block.
  void times_up(int64_t begin, int64_t n, const int32_t* index, int64_t count, float* h) const {
    const Row* rows[kMaxBlock + kAhead];
    float products[kMaxValues];
    int64_t pairs = 0;
    for (int64_t j = 0; j < count; ++j) {
      rows[j] = up + (begin + index[j]) * up_stride;
      for (int64_t t = 0; t < T; ++t) pairs += h[index[j] * T + t] != 0.0f;
    }
    for (int64_t j = 0; j < kAhead; ++j)
      rows[count + j] = down + (begin + (count ? index[j < count ? j : 0] : 0)) * down_stride;
    if (T <= kUnionTokens || 4 * pairs > Product<Rows>::kSums * count * T)
      all_dots<Rows>(rows, count, input, column, T, D, products, T, count == n);
    else
      for (int64_t j = 0; j < count; ++j) {
        const In* own[kMaxTokens];
        int32_t columns[kMaxTokens];
        int64_t tokens = 0;
        for (int64_t t = 0; t < T; ++t)
          if (h[index[j] * T + t] != 0.0f) own[tokens] = input[t], columns[tokens++] = int32_t(t);
        dots_inputs<Rows, 1>(rows + j, own, columns, tokens, D, products + j * T, T, true);
      }
    times_scales(products, up_scales ? up_scales + begin : nullptr, factors, index, count, T);
    const bool relu_up = activations::relu_up(kind);
    for (int64_t j = 0; j < count; ++j)
      multiply<W>(products + j * T, bias(up_bias, begin + index[j]), relu_up, T, h + index[j] * T);
  }

  void given_block(int64_t begin, int64_t n, float* h) const {
    for (int64_t i = 0; i < n; ++i)
      for (int64_t t = 0; t < T; ++t) h[i * T + t] = W::widen(x[t * F + begin + i]);
  }

  // Adds a block's neurons to the partial outputs of group g. The second token that needs a row finds it in the cache.
  void add_block(int64_t g, int64_t begin, int64_t n, const float* h) const {
    const Row* rows[kMaxBlock];
    float own[kMaxBlock];
    for (int64_t t = 0; t < T; ++t) {
      int64_t count = 0;
      for (int64_t i = 0; i < n; ++i)
        if (all || h[i * T + t] != 0.0f) own[count] = h[i * T + t], rows[count++] = down + (begin + i) * down_stride;
      const auto add = all ? add_rows<Rows, true> : add_rows<Rows, false>;
      add(partial + (g * T + t) * D, rows, own, count, 0, D, !written[g * T + t]);
      written[g * T + t] |= count > 0;
    }
  }

  void store_block(int64_t begin, int64_t n, const float* h) const {
    for (int64_t t = 0; t < T; ++t)
      for (int64_t i = 0; i < n; ++i) hidden[t * F + begin + i] = W::narrow(h[i * T + t]);
  }

  void run_group(int64_t g) const {
    float h[kMaxValues];
    const int64_t block = T == 1 ? kMaxBlock : kBatchBlock;
    for (int64_t t = 0; t < T && !stores; ++t) written[g * T + t] = 0;
    for (int64_t begin = begins[g]; begin < begins[g + 1]; begin += block) {
      const int64_t n = begins[g + 1] - begin < block ? begins[g + 1] - begin : block;
      if (gate)
        compute_block(begin, n, h);
      else
        given_block(begin, n, h);
      if (stores)
        store_block(begin, n, h);
      else
        add_block(g, begin, n, h);
    }
  }

  Type scaled(float sum, int64_t i) const {
    return W::narrow((down_scales ? sum * down_scales[i] : sum) + bias(down_bias, i));
  }

  // Columns begin … end - 1 (begin a multiple of kStep) of token t: partial outputs in order, scale, bias, rounding.
  void reduce(int64_t t, int64_t begin, int64_t end) const {
    int64_t i = begin;
    for (; i + kStep <= end; i += kStep) {
      Vec a = {}, b = {};
      for (int64_t g = 0; g < groups; ++g) {
        if (!written[g * T + t]) continue;
        Vec pa, pb;
        Float32::load(partial + (g * T + t) * D + i, pa, pb);
        a += pa;
        b += pb;
      }
      if constexpr (!std::is_same<W, Rows>::value) {  // int8 rows come in their order, which that of W need not be
        float sums[kStep];
        Float32::store(sums, a, b);
        for (int64_t j = 0; j < kStep; ++j) y[t * D + i + j] = scaled(sums[j], i + j);
        continue;
      }
      if (down_bias) {
        Vec ba, bb;
        W::load(down_bias + i, ba, bb);
        a += ba;
        b += bb;
      }
      W::store(y + t * D + i, a, b);
    }
    for (; i < end; ++i) {
      float s = 0.0f;
      for (int64_t g = 0; g < groups; ++g)
        if (written[g * T + t]) s += partial[(g * T + t) * D + i];
      y[t * D + i] = scaled(s, i);
    }
  }

  void run(int threads) {
    if (gate)
      for (int64_t t = 0; t < T; ++t) {
        factors[t] = Product<Rows>::template prepare<W>(x + t * D, inputs + t * padded(D), D);
        input[t] = inputs + t * padded(D);
        column[t] = int32_t(t);
      }
    if (q) quantised = quantise<W>(x, k, D);
    begins[0] = 0;
    for (int64_t g = 0; g < groups; ++g) begins[g + 1] = group_end(begins[g], F);
    const int64_t columns = 8 * kStep, pieces = (D + columns - 1) / columns;
    Pieces first(groups), second(T * pieces);
    together(threads, [&](Worker& me) {
      first.share([&](int64_t g) { run_group(g); });
      if (stores) return;
      first.wait(me);
      second.share([&](int64_t piece) {
        const int64_t begin = piece % pieces * columns;
        reduce(piece / pieces, begin, begin + columns < D ? begin + columns : D);
      });
    });
  }

  // Gives out the scratch memory; returns its size in bytes. With null it only counts.
  int64_t carve(char* scratch, int) {
    groups = count_groups(F);
    Carver take{scratch};
    take(begins, groups + 1);
    take(inputs, gate ? T * padded(D) : 0);
    take(k, q ? D : 0);
    take(partial, stores ? 0 : groups * T * D);
    take(written, stores ? 0 : groups * T);
    return take.at - scratch;
  }
};

}  // namespace
