// The down projection of many tokens as one matrix product: y [T, D] = h [T, F] times rows [F, D], over the neurons
// that are active for any token.
//
// A block of rows is brought into the order in which the inner loop reads it, once for all tokens; meanwhile the rows
// of the next block are fetched. What the inner loop works on stays in the first-level cache (a panel of one step of
// columns, a tile of tokens), the rest in the second-level cache.
//
// Deterministic: threads take whole blocks of columns, and the order of additions is the same in every column. The
// sum of a token depends on the other tokens only through the list of active neurons.
#pragma once

#include <algorithm>
#include <atomic>
#include <utility>

#include "vector.h"

namespace {

// How one step of the inner loop multiplies: kRows rows of weights, one step of columns wide, by one token.
template <class W>
struct Step {
  typedef float In;
  static constexpr int kRows = 1;
  // Share of active pairs below which adding row by row is faster, for few tokens and for many.
  static constexpr double kDensity = 0.45, kDensityOfMany = 0.15;
  static void pack(const typename W::Type* const* rows, int64_t i, float* out) {
    Vec a, b;
    W::load(rows[0] + i, a, b);
    Float32::store(out, a, b);
  }
  static float input(const typename W::Type* h, const int32_t* index) { return W::widen(h[index[0]]); }
  static float adjacent(const typename W::Type* h) { return W::widen(h[0]); }
  static void add(Vec& a, Vec& b, Vec wa, Vec wb, float x) {
    a += wa * x;
    b += wb * x;
  }
};

#if defined(__AVX512BF16__)
// Two rows at a time, whose bfloat16 products are exact and summed in float32. Subnormal numbers count as zero.
template <>
struct Step<BFloat16> {
  typedef uint32_t In;
  static constexpr int kRows = 2;
  static constexpr double kDensity = 0.15, kDensityOfMany = 0.08;
  static void pack(const uint16_t* const* rows, int64_t i, uint32_t* out) {
    const Bits f = *reinterpret_cast<const BitsLoose*>(rows[0] + i);
    const Bits g = *reinterpret_cast<const BitsLoose*>(rows[1] + i);
    *reinterpret_cast<BitsLoose*>(out) = (f & 0xffffu) | (g << 16);
    *reinterpret_cast<BitsLoose*>(out + kLanes) = (f >> 16) | (g & 0xffff0000u);
  }
  static uint32_t input(const uint16_t* h, const int32_t* index) {
    return uint32_t(h[index[0]]) | uint32_t(h[index[1]]) << 16;
  }
  static uint32_t adjacent(const uint16_t* h) {
    uint32_t both;
    std::memcpy(&both, h, 4);
    return both;
  }
  static void add(Vec& a, Vec& b, Vec wa, Vec wb, uint32_t x) {
    const __m512bh both = (__m512bh)_mm512_set1_epi32(int32_t(x));
    a = (Vec)_mm512_dpbf16_ps((__m512)a, (__m512bh)wa, both);
    b = (Vec)_mm512_dpbf16_ps((__m512)b, (__m512bh)wb, both);
  }
};
#endif

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define HFS_SHUFFLES
// a0 b0 a1 b1 …, in two vectors.
template <int... I>
void interleave(Bits a, Bits b, Bits& first, Bits& second, std::integer_sequence<int, I...>) {
  first = __builtin_shufflevector(a, b, (I / 2 + I % 2 * kLanes)...);
  second = __builtin_shufflevector(a, b, (kLanes / 2 + I / 2 + I % 2 * kLanes)...);
}
#endif
#endif

template <class W>
struct Linear {
  typedef typename W::Type Type;
  typedef typename Step<W>::In In;
  static constexpr int kTokens = kManyRegisters ? 8 : 4;  // in a tile
  static constexpr int64_t kSteps = 128;                  // in a block of rows
  static constexpr int64_t kRows = kSteps * Step<W>::kRows;
  static constexpr int64_t kColumns = 256;  // in a block of columns
  static constexpr int64_t kMaxT = 512;     // tokens at once, whose outputs of one block of columns stay in the cache
  static constexpr int64_t kMarked = 512;   // neurons
  // Panels at a power of two from each other would share lines of the cache.
  static constexpr int64_t kPanel = kSteps * kStep + kStep;

  const Type *h, *w, *bias;  // bias may be null
  Type* y;
  int64_t T, D, F, stride;
  // Set by carve().
  int64_t less, more;  // tokens of a tile, tiles with one more
  int64_t columns;
  uint8_t* any;      // [F]
  int32_t* index;    // [F + 1]
  In* inputs;        // [F rounded up / rows of a step, T], tile by tile within a block
  char* own;         // [threads, each]: float sums [columns / kStep, T, kStep] and In panels [columns / kStep, kPanel]
  // Set by run().
  int64_t active;

  int64_t blocks() const { return (active + kRows - 1) / kRows; }
  int64_t rows_in(int64_t block) const { return active - block * kRows < kRows ? active - block * kRows : kRows; }
  int64_t steps_in(int64_t block) const { return (rows_in(block) + Step<W>::kRows - 1) / Step<W>::kRows; }
  int64_t each() const { return columns * T * int64_t(sizeof(float)) + columns / kStep * kPanel * int64_t(sizeof(In)); }
  int64_t tiles() const { return (T + kTokens - 1) / kTokens; }
  int64_t tokens(int64_t i) const { return less + (i < more); }  // of tile i

  void mark(int64_t begin) const {
    const int64_t n = F - begin < kMarked ? F - begin : kMarked;
    typename W::Magnitude seen[kMarked] = {};  // not in place, so that compilers see that nothing is read after a change
    // With many tokens all neurons are soon known to be active.
    bool all = false;
    for (int64_t t = 0; t < T && !all; ++t) {
      for (int64_t i = 0; i < n; ++i) seen[i] |= W::magnitude(h[t * F + begin + i]);
      if (t % kTokens == kTokens - 1) {
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

  // A tile of kTokens tokens; the rows of all steps are neighbours.
  void pack_adjacent(const Type* at, int64_t steps, In* out) const {
    int64_t s = 0;
#if defined(HFS_SHUFFLES)
    if constexpr (kTokens == 8 && sizeof(In) == 4 && Step<W>::kRows * sizeof(Type) == 4)
      for (; s + kLanes <= steps; s += kLanes) {
        Bits v[8], shuffled[8];
        for (int t = 0; t < 8; ++t) v[t] = *reinterpret_cast<const BitsLoose*>(at + t * F + s * Step<W>::kRows);
        // Each round rotates the bits of an element's place in all of v: from (token, step) to (step, token).
        for (int round = 0; round < 3; ++round) {
          for (int i = 0; i < 4; ++i)
            interleave(v[i], v[i + 4], shuffled[2 * i], shuffled[2 * i + 1],
                       std::make_integer_sequence<int, kLanes>());
          std::memcpy(v, shuffled, sizeof v);
        }
        for (int i = 0; i < 8; ++i) *reinterpret_cast<BitsLoose*>(out + s * 8 + i * kLanes) = v[i];
      }
#endif
    for (; s < steps; ++s)
      for (int t = 0; t < kTokens; ++t) out[s * kTokens + t] = Step<W>::adjacent(at + t * F + s * Step<W>::kRows);
  }

  void pack_inputs(int64_t block) const {
    const int64_t steps = steps_in(block), rows = rows_in(block);
    const int32_t* const own = index + block * kRows;
    In* out = inputs + block * kSteps * T;
    for (int64_t i = 0, first = 0, n; i < tiles(); ++i, first += n) {
      n = tokens(i);
      const bool adjacent = own[rows - 1] - own[0] == rows - 1;
      const Type* const at = h + first * F;
      const int64_t whole = rows / Step<W>::kRows;
      if (adjacent && n == kTokens)
        pack_adjacent(at + own[0], whole, out);
      else
        for (int64_t s = 0; s < whole; ++s)
          for (int64_t t = 0; t < n; ++t) out[s * n + t] = Step<W>::input(at + t * F, own + s * Step<W>::kRows);
      for (int64_t t = 0; t < n && whole < steps; ++t)
        out[whole * n + t] = In(at[t * F + own[rows - 1]]);  // and nothing in the place of the other row
      out += steps * n;
    }
  }

  void pack_rows(int64_t block, int64_t begin, int64_t end, In* panel) const {
    const int64_t steps = steps_in(block);
    const int32_t* own = index + block * kRows;
    for (int64_t s = 0; s < steps; ++s, own += Step<W>::kRows) {
      const Type* rows[Step<W>::kRows];
      for (int r = 0; r < Step<W>::kRows; ++r) rows[r] = w + own[r] * stride;
      In* out = panel + s * kStep;
      int64_t i = begin;
      for (; i + kStep <= end; i += kStep, out += kPanel) Step<W>::pack(rows, i, out);
      if (i < end) {
        Type tails[Step<W>::kRows][kStep] = {};
        for (int r = 0; r < Step<W>::kRows; ++r) {
          std::memcpy(tails[r], rows[r] + i, (end - i) * sizeof(Type));
          rows[r] = tails[r];
        }
        Step<W>::pack(rows, 0, out);
      }
    }
  }

  // The rows that are worked on next, to be fetched meanwhile: a line or a few between pieces of the inner loop. All at
  // once they would take the place of its own misses.
  struct Ahead {
    static constexpr int64_t kPiece = 16;  // steps
    static constexpr int64_t kPieces = kSteps / kPiece;
    static constexpr int64_t kLine = 64 / int64_t(sizeof(Type));
    const Type* w;
    int64_t stride, width;
    const int32_t* row;     // the next to be fetched
    int64_t share, shares;  // of all lines, in each call of multiply()
    int64_t due = 0, column = 0, n = 0;
    const Type* lines[kPieces * 64];  // [kPieces, n]

    Ahead(const Linear& job, const int32_t* row, int64_t rows, int64_t begin, int64_t end, int64_t calls)
        : w(job.w + begin), stride(job.stride), width(end - begin), row(row),
          share(rows * ((width + kLine - 1) / kLine)), shares(calls) {}

    // What the next call fetches.
    void plan() {
      int64_t count = 0;
      for (due += share; due >= shares && count < kPieces * 64; due -= shares) {
        lines[count++] = w + *row * stride + column;
        if ((column += kLine) >= width) column = 0, ++row;
      }
      for (n = (count + kPieces - 1) / kPieces; count < kPieces * n; ++count) lines[count] = lines[count - 1];
    }
  };

  // Adds to the sums of N tokens what one panel gives them.
  template <int N>
  static void multiply(const In* panel, const In* x, int64_t steps, bool fresh, float* out, const Ahead& ahead) {
    Vec a[N], b[N];
#pragma GCC unroll 8
    for (int t = 0; t < N; ++t) a[t] = b[t] = Vec{};
    const Type* const* line = ahead.lines;
    const float* next_out = out + N * kStep;
    for (const In* const end = panel + steps * kStep; panel < end;) {
      for (int64_t i = 0; i < ahead.n; ++i) __builtin_prefetch(*line++, 0, 2);
      // Of the next tile, if there is one: sums of one token, and inputs of as many steps as now.
      __builtin_prefetch(next_out, 1, 3), __builtin_prefetch(next_out + kLanes, 1, 3), next_out += kStep;
#pragma GCC unroll 8
      for (int t = 0; t < N; ++t) __builtin_prefetch(x + steps * N + t * Ahead::kPiece, 0, 2);
      const In* const until = end - panel > Ahead::kPiece * kStep ? panel + Ahead::kPiece * kStep : end;
      for (; panel < until; panel += kStep, x += N) {
        Vec wa, wb;
        Float32::load(reinterpret_cast<const float*>(panel), wa, wb);
#pragma GCC unroll 8
        for (int t = 0; t < N; ++t) Step<W>::add(a[t], b[t], wa, wb, x[t]);
      }
    }
    for (int t = 0; t < N; ++t) {
      Vec before_a = {}, before_b = {};
      if (!fresh) Float32::load(out + t * kStep, before_a, before_b);
      Float32::store(out + t * kStep, before_a + a[t], before_b + b[t]);
    }
  }

  template <int N = kTokens>
  static void multiply(int64_t n, const In* panel, const In* x, int64_t steps, bool fresh, float* out,
                       const Ahead& ahead) {
    if (n == N)
      multiply<N>(panel, x, steps, fresh, out, ahead);
    else if constexpr (N > 1)
      multiply<N - 1>(n, panel, x, steps, fresh, out, ahead);
  }

  int64_t end_of(int64_t begin) const { return begin + columns < D ? begin + columns : D; }

  // One block of columns of all tokens. Returns where the next one begins, of take(), which is asked as late as its first
  // rows can still be fetched ahead.
  template <class Take>
  int64_t run_columns(int64_t begin, Take take, float* sum, In* panel) const {
    int64_t after = D;
    const int64_t end = end_of(begin);
    const int64_t count = (end - begin + kStep - 1) / kStep;
    for (int64_t block = 0; block < blocks(); ++block) {
      pack_rows(block, begin, end, panel);
      const bool last = block + 1 == blocks();
      if (last) after = take();
      const int64_t steps = steps_in(block), next = last ? 0 : block + 1, from = last ? after : begin;
      Ahead ahead(*this, index + next * kRows, rows_in(next), from, end_of(from), count * tiles());
      float* out = sum;
      for (int64_t p = 0; p < count; ++p) {
        const In* x = inputs + block * kSteps * T;
        for (int64_t i = 0, n; i < tiles(); ++i, x += steps * n, out += n * kStep) {
          ahead.plan();
          n = tokens(i);
          multiply(n, panel + p * kPanel, x, steps, block == 0, out, ahead);
        }
      }
    }
    for (int64_t t = 0; t < T; ++t) finish(t, begin, end, sum + t * kStep);
    return active ? after : take();
  }

  // One token's bias and rounding; step p of the columns is at sum[p * T * kStep].
  void finish(int64_t t, int64_t begin, int64_t end, const float* sum) const {
    Vec check = {};
    for (int64_t i = begin; i < end; i += kStep) {
      Vec a = {}, b = {};
      if (active) Float32::load(sum + (i - begin) * T, a, b);
      check += not_finite(a, b);
      put(t, i, end, a, b);
    }
    // An infinite weight of a neuron that is silent for this token has become NaN, in some step.
    if (::sum(check) == 0.0f) return;
    for (int64_t i = begin; i < end; i += kStep) {
      Vec a, b;
      Float32::load(sum + (i - begin) * T, a, b);
      if (::sum(not_finite(a, b)) == 0.0f) continue;
      exactly(t, i, end - i < kStep ? end - i : kStep, a, b);
      put(t, i, end, a, b);
    }
  }

  // Zeros, but for NaN in the place of an infinity or a NaN.
  static Vec not_finite(Vec a, Vec b) { return 0.0f * a + 0.0f * b; }

  // The sums of one step of columns into y, as far as there are columns.
  void put(int64_t t, int64_t i, int64_t end, Vec a, Vec b) const {
    const int64_t n = end - i < kStep ? end - i : kStep;
    Type out[kStep], biases[kStep] = {};
    if (bias) {
      Vec ba, bb;
      std::memcpy(biases, bias + i, n * sizeof(Type));
      W::load(biases, ba, bb);
      a += ba, b += bb;
    }
    W::store(out, a, b);
    std::memcpy(y + t * D + i, out, n * sizeof(Type));
  }

  // The sums of one token and the n columns from i, of only the rows that this token needs.
  void exactly(int64_t t, int64_t i, int64_t n, Vec& a, Vec& b) const {
    a = b = Vec{};
    for (int64_t j = 0; j < active; ++j) {
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

  void run(int threads) {
    std::atomic<int64_t> next{0}, workers{0};
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(static)
      for (int64_t f = 0; f < F; f += kMarked) mark(f);
#pragma omp single
      active = list();
#pragma omp for schedule(static)
      for (int64_t block = 0; block < blocks(); ++block) pack_inputs(block);
      // What prefetchers ask for behind the sums, which are written all the time, is then this thread's own as well.
      float* const sums = (float*)(own + workers.fetch_add(1) * each());
      In* const panels = (In*)(sums + columns * T);
      const auto take = [&] { return std::min(columns * next.fetch_add(1), D); };
      int64_t begin = take();
#pragma omp barrier  // each thread has a block before any takes its second
      while (begin < D) begin = run_columns(begin, take, sums, panels);
    }
  }

  // Gives out the scratch memory; returns its size in bytes. With null it only counts.
  int64_t carve(char* scratch, int threads) {
    less = T / tiles(), more = T % tiles();
    const int64_t blocks = ((D + kColumns - 1) / kColumns + threads - 1) / threads * threads;
    columns = ((D + blocks - 1) / blocks + kStep - 1) / kStep * kStep;
    Carver take{scratch};
    take(any, F);
    take(index, F + 1);
    take(inputs, (F + Step<W>::kRows) / Step<W>::kRows * T);
    take(own, threads * each());
    return take.at - scratch;
  }
};

// The share of values of h [T, F] that are not zero; of many tokens a few are asked.
template <class W>
double density(const typename W::Type* h, int64_t T, int64_t F, int threads) {
  const int64_t asked = T < 32 ? T : 32;
  int64_t count = 0;
#pragma omp parallel for num_threads(threads) reduction(+ : count) if (threads > 1)
  for (int64_t i = 0; i < asked; ++i) {
    const typename W::Type* const token = h + i * T / asked * F;
    int32_t own = 0;
    for (int64_t f = 0; f < F; ++f) own += W::magnitude(token[f]) != 0;
    count += own;
  }
  return double(count) / double(asked * F);
}

}  // namespace
