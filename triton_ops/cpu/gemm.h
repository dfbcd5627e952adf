// Products of matrices for many tokens: y [T, N] = x [T, K] times weights [K, N], summed in float32.
//
// A block of the weights is brought into the order in which the inner loop reads it, once for all tokens; meanwhile the
// next block is fetched. What the inner loop works on stays in the first-level cache (a panel of one step of columns, a
// tile of tokens), the rest in the second-level cache.
//
// Deterministic: a thread makes whole columns, and the order of additions is the same in every column.
#pragma once

#include <algorithm>
#include <utility>

#include "team.h"
#include "vector.h"

namespace {

// How one step of the inner loop multiplies: kRows rows of the weights [K, N], kStep columns wide, by one token.
template <class W>
struct Step {
  typedef float In;
  static constexpr int kRows = 1;
  static constexpr double kDensity = 0.4;  // share of active pairs below which one after the other is faster
  static void load(const typename W::Type* const* rows, int64_t i, Vec& a, Vec& b) { W::load(rows[0] + i, a, b); }
  static float input(const typename W::Type* h, const int32_t* index) { return W::widen(h[index[0]]); }
  static float adjacent(const typename W::Type* h) { return W::widen(h[0]); }
  static Vec lanes(const typename W::Type* h) { return W::lanes(h); }  // adjacent() of kLanes steps
  static float last(const typename W::Type* h) { return W::widen(h[0]); }
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
  static constexpr double kDensity = 0.2;
  static void load(const uint16_t* const* rows, int64_t i, Vec& a, Vec& b) {
    const Bits f = *reinterpret_cast<const BitsLoose*>(rows[0] + i);
    const Bits g = *reinterpret_cast<const BitsLoose*>(rows[1] + i);
    a = (Vec)((f & 0xffffu) | (g << 16));
    b = (Vec)((f >> 16) | (g & 0xffff0000u));
  }
  static uint32_t input(const uint16_t* h, const int32_t* index) {
    return uint32_t(h[index[0]]) | uint32_t(h[index[1]]) << 16;
  }
  static uint32_t adjacent(const uint16_t* h) {
    uint32_t both;
    std::memcpy(&both, h, 4);
    return both;
  }
  static Vec lanes(const uint16_t* h) { return (Vec)*reinterpret_cast<const BitsLoose*>(h); }
  static uint32_t last(const uint16_t* h) { return *h; }  // and nothing in the place of the other row
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

// Rotates, so many times, the bits of an element's place (vector, lane) in all of v.
template <int N, int Times>
void rotate(Bits* v) {
  Bits to[N];
  for (int round = 0; round < Times; ++round) {
    for (int i = 0; i < N / 2; ++i)
      interleave(v[i], v[i + N / 2], to[2 * i], to[2 * i + 1], std::make_integer_sequence<int, kLanes>());
    std::memcpy(v, to, sizeof to);
  }
}
#endif
#endif

// Adds a block's part to one step of sums: block by block, so that rounding errors do not add up over all rows.
inline void add_to(float* sum, Vec a, Vec b, bool fresh) {
  Vec before_a = {}, before_b = {};
  if (!fresh) Float32::load(sum, before_a, before_b);
  Float32::store(sum, before_a + a, before_b + b);
}

// Adds the bias, which may be null, to one step of sums, n of which are of columns.
template <class W>
void add_bias(Vec& a, Vec& b, const typename W::Type* bias, int64_t n) {
  if (!bias) return;
  typename W::Type own[kStep] = {};
  Vec ba, bb;
  std::memcpy(own, bias, n * sizeof *bias);
  W::load(own, ba, bb);
  a += ba, b += bb;
}

// The same, and into y.
template <class W>
void store_with_bias(Vec a, Vec b, const typename W::Type* bias, int64_t n, typename W::Type* y) {
  typename W::Type out[kStep];
  add_bias<W>(a, b, bias, n);
  W::store(out, a, b);
  std::memcpy(y, out, n * sizeof *y);
}

// The weights that a product needs next, to be fetched meanwhile: a line or a few between pieces of the inner loop. All
// at once they would take the place of its own misses.
template <class Type>
struct Ahead {
  static constexpr int64_t kLine = 64 / int64_t(sizeof(Type));
  static constexpr int64_t kMost = 512;  // lines at once
  const Type* w;
  int64_t stride;
  const int32_t* row;  // the next to be fetched, at w + *row * stride
  int64_t width;       // elements of each
  int64_t share;       // lines of all rows
  int64_t calls;       // of plan(), each for an equal part of them
  int64_t due = 0, column = 0, n = 0;
  const Type* lines[kMost];  // [pieces, n]

  Ahead(const Type* w, int64_t stride, const int32_t* row, int64_t rows, int64_t width, int64_t calls)
      : w(w), stride(stride), row(row), width(width), share(rows * ((width + kLine - 1) / kLine)), calls(calls) {}

  // What the next call fetches.
  void plan(int64_t pieces) {
    int64_t count = 0;
    for (due += share; due >= calls && count < kMost; due -= calls) {
      lines[count++] = w + *row * stride + column;
      if ((column += kLine) >= width) column = 0, ++row;
    }
    for (n = (count + pieces - 1) / pieces; count < pieces * n; ++count) lines[count] = lines[count - 1];
  }
};

template <class W>
struct Gemm {
  typedef typename W::Type Type;
  typedef typename Step<W>::In In;
  static constexpr int kTokens = kManyRegisters ? 8 : 4;  // in a tile
  static constexpr int64_t kSteps = 128;                  // in a block of rows
  static constexpr int64_t kRows = kSteps * Step<W>::kRows;
  static constexpr int64_t kPiece = 16;   // steps between fetches
  static constexpr int64_t kPieces = kSteps / kPiece;
  // Panels at a power of two from each other would share lines of the cache.
  static constexpr int64_t kPanel = kSteps * kStep + kStep;

  const Type* x;           // [T, width]
  int64_t T, width;
  const int32_t* index;    // [K + 1]: the columns of x that count, in order, and once more the last
  int64_t K;
  // Set by carve().
  int64_t less, more;  // tokens of a tile, tiles with one more
  int64_t columns;     // in a block of columns
  In* inputs;          // [width rounded up / rows of a step, T], tile by tile within a block
  char* own;           // [threads, each]: float sums [columns / kStep, T, kStep] and In panels [columns / kStep, kPanel]

  int64_t blocks() const { return (K + kRows - 1) / kRows; }
  int64_t rows_in(int64_t block) const { return K - block * kRows < kRows ? K - block * kRows : kRows; }
  int64_t steps_in(int64_t block) const { return (rows_in(block) + Step<W>::kRows - 1) / Step<W>::kRows; }
  int64_t each() const { return columns * T * int64_t(sizeof(float)) + columns / kStep * kPanel * int64_t(sizeof(In)); }
  int64_t tiles() const { return (T + kTokens - 1) / kTokens; }
  int64_t tokens(int64_t i) const { return less + (i < more); }  // of tile i
  float* sums(int64_t worker) const { return (float*)(own + worker * each()); }
  In* panels(int64_t worker) const { return (In*)(sums(worker) + columns * T); }

  // A tile of kTokens tokens; the rows of all steps are neighbours.
  void pack_adjacent(const Type* at, int64_t steps, In* out) const {
    int64_t s = 0;
#if defined(HFS_SHUFFLES)
    if constexpr (kTokens == 8)
      for (; s + kLanes <= steps; s += kLanes) {
        Bits v[8];
        for (int t = 0; t < 8; ++t) v[t] = (Bits)Step<W>::lanes(at + t * width + s * Step<W>::kRows);
        rotate<8, 3>(v);
        for (int i = 0; i < 8; ++i) *reinterpret_cast<BitsLoose*>(out + s * 8 + i * kLanes) = v[i];
      }
#endif
    for (; s < steps; ++s)
      for (int t = 0; t < kTokens; ++t) out[s * kTokens + t] = Step<W>::adjacent(at + t * width + s * Step<W>::kRows);
  }

  void pack_inputs(int64_t block) const {
    const int64_t steps = steps_in(block), rows = rows_in(block);
    const int32_t* const own = index + block * kRows;
    In* out = inputs + block * kSteps * T;
    for (int64_t i = 0, first = 0, n; i < tiles(); ++i, first += n) {
      n = tokens(i);
      const bool adjacent = own[rows - 1] - own[0] == rows - 1;
      const Type* const at = x + first * width;
      const int64_t whole = rows / Step<W>::kRows;
      if (adjacent && n == kTokens)
        pack_adjacent(at + own[0], whole, out);
      else
        for (int64_t s = 0; s < whole; ++s)
          for (int64_t t = 0; t < n; ++t) out[s * n + t] = Step<W>::input(at + t * width, own + s * Step<W>::kRows);
      for (int64_t t = 0; t < n && whole < steps; ++t) out[whole * n + t] = Step<W>::last(at + t * width + own[rows - 1]);
      out += steps * n;
    }
  }

  // Adds to the sums of N tokens what one panel gives them.
  template <int N>
  static void multiply(const In* panel, const In* x, int64_t steps, bool fresh, float* out, const Ahead<Type>& ahead) {
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
      for (int t = 0; t < N; ++t) __builtin_prefetch(x + steps * N + t * kPiece, 0, 2);
      const In* const until = end - panel > kPiece * kStep ? panel + kPiece * kStep : end;
      for (; panel < until; panel += kStep, x += N) {
        Vec wa, wb;
        Float32::load(reinterpret_cast<const float*>(panel), wa, wb);
#pragma GCC unroll 8
        for (int t = 0; t < N; ++t) Step<W>::add(a[t], b[t], wa, wb, x[t]);
      }
    }
    for (int t = 0; t < N; ++t) add_to(out + t * kStep, a[t], b[t], fresh);
  }

  template <int N = kTokens>
  static void multiply(int64_t n, const In* panel, const In* x, int64_t steps, bool fresh, float* out,
                       const Ahead<Type>& ahead) {
    if (n == N)
      multiply<N>(panel, x, steps, fresh, out, ahead);
    else if constexpr (N > 1)
      multiply<N - 1>(n, panel, x, steps, fresh, out, ahead);
  }

  // The sums of columns begin … end - 1 for all tokens: step p of the columns and token t at sum[(p * T + t) * kStep].
  // next(calls) gives what to fetch while the last block is worked on; it is asked as late as that.
  template <class Weights, class Next>
  void run(const Weights& w, int64_t begin, int64_t end, Next next, float* sum, In* panel) const {
    const int64_t count = (end - begin + kStep - 1) / kStep, calls = count * tiles();
    for (int64_t block = 0; block < blocks(); ++block) {
      const int64_t steps = steps_in(block);
      w.pack(index + block * kRows, rows_in(block), begin, end, panel);
      Ahead<Type> ahead = block + 1 < blocks()
          ? w.ahead(index + (block + 1) * kRows, rows_in(block + 1), begin, end, calls)
          : next(calls);
      float* out = sum;
      for (int64_t p = 0; p < count; ++p) {
        const In* in = inputs + block * kSteps * T;
        for (int64_t i = 0, n; i < tiles(); ++i, in += steps * n, out += n * kStep) {
          ahead.plan(kPieces);
          n = tokens(i);
          multiply(n, panel + p * kPanel, in, steps, block == 0, out, ahead);
        }
      }
    }
  }

  void carve(Carver& take, int64_t block, int threads) {
    less = T / tiles(), more = T % tiles();
    columns = block;
    take(inputs, (width + Step<W>::kRows - 1) / Step<W>::kRows * T);
    take(own, threads * each());
  }
};

// Weights [K, N] whose columns lie side by side, as those of a down projection for decoding.
template <class W>
struct Across {
  typedef typename W::Type Type;
  typedef typename Step<W>::In In;
  const Type* w;
  int64_t stride;  // between rows

  Ahead<Type> ahead(const int32_t* row, int64_t rows, int64_t begin, int64_t end, int64_t calls) const {
    return {w + begin, stride, row, rows, end - begin, calls};
  }

  static void pack_step(const Type* const* rows, int64_t i, In* out) {
    Vec a, b;
    Step<W>::load(rows, i, a, b);
    Float32::store(reinterpret_cast<float*>(out), a, b);
  }

  // Steps of the rows in the list, and once more of its last row if they are not whole.
  void pack(const int32_t* row, int64_t n, int64_t begin, int64_t end, In* panel) const {
    for (int64_t s = 0; s * Step<W>::kRows < n; ++s, row += Step<W>::kRows) {
      const Type* rows[Step<W>::kRows];
      for (int r = 0; r < Step<W>::kRows; ++r) rows[r] = w + row[r] * stride;
      In* out = panel + s * kStep;
      int64_t i = begin;
      for (; i + kStep <= end; i += kStep, out += Gemm<W>::kPanel) pack_step(rows, i, out);
      if (i < end) {
        Type tails[Step<W>::kRows][kStep] = {};
        for (int r = 0; r < Step<W>::kRows; ++r) {
          std::memcpy(tails[r], rows[r] + i, (end - i) * sizeof(Type));
          rows[r] = tails[r];
        }
        pack_step(rows, 0, out);
      }
    }
  }
};

// Weights [K, N] whose rows lie side by side, as those of an nn.Linear. All rows count.
template <class W>
struct Along {
  typedef typename W::Type Type;
  typedef typename Step<W>::In In;
  const Type* w;
  int64_t stride;          // between columns
  const int32_t* columns;  // [N]

  Ahead<Type> ahead(const int32_t* row, int64_t rows, int64_t begin, int64_t end, int64_t calls) const {
    return {w + *row, stride, columns + begin, end - begin, rows, calls};
  }

  void pack(const int32_t* row, int64_t n, int64_t begin, int64_t end, In* panel) const {
    for (; begin < end; begin += kStep, panel += Gemm<W>::kPanel) {
      const Type* at[kStep];  // in the order in which a step has its columns
      for (int64_t i = 0; i < kStep; ++i)
        at[W::place(i)] = w + columns[std::min(begin + i, end - 1)] * stride + *row;
      pack_step(at, n, panel);
    }
  }

  static void pack_step(const Type* const* at, int64_t n, In* out) {
    const int64_t whole = n / Step<W>::kRows;
    int64_t s = 0;
#if defined(HFS_SHUFFLES)
    for (; s + kLanes <= whole; s += kLanes)
      for (int64_t half = 0; half < 2; ++half) {
        Bits v[kLanes];
        for (int i = 0; i < kLanes; ++i) v[i] = (Bits)Step<W>::lanes(at[half * kLanes + i] + s * Step<W>::kRows);
        rotate<kLanes, kLaneBits>(v);
        for (int i = 0; i < kLanes; ++i) *reinterpret_cast<BitsLoose*>(out + (s + i) * kStep + half * kLanes) = v[i];
      }
#endif
    for (; s < whole; ++s)
      for (int64_t i = 0; i < kStep; ++i) out[s * kStep + i] = Step<W>::adjacent(at[i] + s * Step<W>::kRows);
    for (int64_t i = 0; i < kStep && whole * Step<W>::kRows < n; ++i)
      out[whole * kStep + i] = Step<W>::last(at[i] + whole * Step<W>::kRows);
  }
};

}  // namespace
