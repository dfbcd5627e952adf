// The down projection of many tokens of which each has few active neurons: y [T, D] = h [T, F] times rows [F, D], one
// pair of token and active neuron after the other.
//
// A thread makes a block of columns of all tokens, whose sums stay in the second-level cache, as do the rows of a block
// of neurons there. Rows that no token needs are not read. The sum of a token does not depend on the other tokens.
#pragma once

#include "gemm.h"

namespace {

template <class W>
struct Pairs {
  typedef typename W::Type Type;
  typedef typename Step<W>::In In;
  static constexpr int kRows = Step<W>::kRows;
  static constexpr int64_t kNeurons = 256;                        // in a block
  static constexpr int64_t kSteps = kManyRegisters ? 8 : 4;       // in a block of columns, whose sums are in registers
  static constexpr int64_t kColumns = kSteps * kStep;
  static constexpr int64_t kMaxT = 256;                           // tokens at once
  static constexpr int64_t kShares = 3;                           // of the work, for each thread
  static constexpr int64_t kFewTokens = 16;                       // for which it is not worth while to read rows
  // Rows that are added in one step: at places of their block, and the values of h there. (Subnormal bfloat16 values
  // count as zero in the product, so with an infinite weight they give NaN.)
  struct Entry {
    In x;
    int16_t place[kRows];  // -1: none
  };

  const Type *h, *w, *bias;  // bias may be null
  Type* y;
  int64_t T, D, F, stride;
  // Set by carve().
  Entry* entries;   // of each block T * kNeurons / kRows, those of a token behind those of the one before
  int32_t* starts;  // [blocks, T + 1]: of a token's entries in those of the block
  int32_t* index;   // [blocks, kNeurons]: the neurons that are active for any token …
  int32_t* used;    // [blocks] … of which there are so many
  float* sums;      // [threads, T, kColumns]

  int64_t blocks() const { return (F + kNeurons - 1) / kNeurons; }

  void list(int64_t block) const {
    const int64_t first = block * kNeurons, n = std::min(F - first, kNeurons);
    uint8_t any[kNeurons] = {};
    Entry* const all = entries + block * T * (kNeurons / kRows);
    Entry* entry = all;
    for (int64_t t = 0; t < T; ++t) {
      starts[block * (T + 1) + t] = int32_t(entry - all);
      const Type* const own = h + t * F + first;
      int32_t active[kNeurons + 1], count = 0, i = 0;
      for (int64_t j = 0; j < n; ++j) active[count] = int32_t(j), count += W::magnitude(own[j]) != 0;
      for (int32_t j = 0; j < count; ++j) any[active[j]] = 1;
      for (; i + kRows <= count; i += kRows, ++entry) {
        entry->x = Step<W>::input(own, active + i);
        for (int r = 0; r < kRows; ++r) entry->place[r] = int16_t(active[i + r]);
      }
      if (i < count) {
        entry->x = Step<W>::last(own + active[i]);
        for (int r = 0; r < kRows; ++r) entry->place[r] = r ? -1 : int16_t(active[i]);
        ++entry;
      }
    }
    starts[block * (T + 1) + T] = int32_t(entry - all);
    int32_t count = 0;
    for (int64_t i = 0; i < n; ++i)
      if (any[i]) index[block * kNeurons + count++] = int32_t(first + i);
    used[block] = count;
  }

  // The rows of a block, if there is one.
  Ahead<Type> ahead(int64_t block, int64_t begin, int64_t calls) const {
    const int64_t rows = block < blocks() ? used[block] : 0;
    return {w + begin, stride, index + block * kNeurons, rows, std::min(D - begin, kColumns), calls};
  }

  // Adds one token's rows of a block: N steps of columns from `rows` on.
  template <int N>
  static void add(const Type* rows, int64_t stride, const Type* none, const Entry* entry, int64_t count, bool fresh,
                  float* sum) {
    Vec a[N], b[N];
#pragma GCC unroll 8
    for (int c = 0; c < N; ++c) a[c] = b[c] = Vec{};
    for (; count > 0; --count, ++entry) {
      const Type* at[kRows];
      for (int r = 0; r < kRows; ++r) at[r] = entry->place[r] < 0 ? none : rows + entry->place[r] * stride;
#pragma GCC unroll 8
      for (int c = 0; c < N; ++c) {
        Vec wa, wb;
        Step<W>::load(at, c * kStep, wa, wb);
        Step<W>::add(a[c], b[c], wa, wb, entry->x);
      }
    }
#pragma GCC unroll 8
    for (int c = 0; c < N; ++c) add_to(sum + c * kStep, a[c], b[c], fresh);
  }

  template <int N = kSteps>
  static void add(int64_t n, const Type* rows, int64_t stride, const Type* none, const Entry* entry, int64_t count,
                  bool fresh, float* sum) {
    if (n == N)
      add<N>(rows, stride, none, entry, count, fresh, sum);
    else if constexpr (N > 1)
      add<N - 1>(n, rows, stride, none, entry, count, fresh, sum);
  }

  // The same for the last columns, too few for a step.
  static void add_tail(const Type* rows, int64_t stride, int64_t n, const Entry* entry, int64_t count, bool fresh,
                       float* sum) {
    Vec a = {}, b = {};
    for (; count > 0; --count, ++entry) {
      Type tails[kRows][kStep] = {};
      const Type* at[kRows];
      for (int r = 0; r < kRows; ++r) {
        at[r] = tails[r];
        if (entry->place[r] >= 0) std::memcpy(tails[r], rows + entry->place[r] * stride, n * sizeof(Type));
      }
      Vec wa, wb;
      Step<W>::load(at, 0, wa, wb);
      Step<W>::add(a, b, wa, wb, entry->x);
    }
    add_to(sum, a, b, fresh);
  }

  // One block of columns of tokens first … last - 1.
  void run_columns(int64_t begin, int64_t first, int64_t last, float* sum) const {
    static const Type none[kColumns] = {};
    const int64_t n = std::min(D - begin, kColumns), whole = n / kStep, rest = n % kStep;
    for (int64_t block = 0; block < blocks(); ++block) {
      const Type* const rows = w + block * kNeurons * stride + begin;
      const bool fresh = block == 0;
      const int32_t* const start = starts + block * (T + 1);
      const Entry* own = entries + block * T * (kNeurons / kRows) + start[first];
      Ahead<Type> next = ahead(block + 1, begin, last - first);
      for (int64_t t = first; t < last; ++t) {
        next.plan(1);
        for (int64_t i = 0; i < next.n; ++i) __builtin_prefetch(next.lines[i], 0, 2);
        float* const to = sum + (t - first) * kColumns;
        const int64_t count = start[t + 1] - start[t];
        if (whole) add(whole, rows, stride, none, own, count, fresh, to);
        if (rest) add_tail(rows + whole * kStep, stride, rest, own, count, fresh, to + whole * kStep);
        own += count;
      }
    }
    for (int64_t t = first; t < last; ++t)
      for (int64_t i = 0; i < n; i += kStep) {
        Vec a, b;
        Float32::load(sum + (t - first) * kColumns + i, a, b);
        store_with_bias<W>(a, b, bias ? bias + begin + i : nullptr, std::min(n - i, kStep), y + t * D + begin + i);
      }
  }

  void run(int threads) const {
    // Tokens are shared out as well where there are too few blocks of columns for all threads.
    const int64_t blocks_of_columns = (D + kColumns - 1) / kColumns;
    const int64_t wanted = (kShares * threads + blocks_of_columns - 1) / blocks_of_columns;
    const int64_t shares = std::max<int64_t>(1, std::min(wanted, T / kFewTokens));
    Pieces lists(blocks()), products(blocks_of_columns * shares);
    together(threads, [&](Worker& me) {
      lists.share([&](int64_t block) { list(block); });
      lists.wait(me);
      float* const own = sums + me.index * T * kColumns;
      products.share([&](int64_t i) {
        const int64_t share = i % shares;
        run_columns(i / shares * kColumns, share * T / shares, (share + 1) * T / shares, own);
      });
    });
  }

  // Gives out the scratch memory; returns its size in bytes. With null it only counts.
  int64_t carve(char* scratch, int threads) {
    Carver take{scratch};
    take(entries, blocks() * T * (kNeurons / kRows));
    take(starts, blocks() * (T + 1));
    take(index, blocks() * kNeurons);
    take(used, blocks());
    take(sums, threads * T * kColumns);
    return take.at - scratch;
  }
};

}  // namespace
