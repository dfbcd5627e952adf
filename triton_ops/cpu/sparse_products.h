// Products with a sparse matrix S [R, C], whose entries are the pairs of a token and a neuron that is active for it, or
// the transposed: what training does with an MLP beside its deciding projection.
//
// The dense factors are read in blocks, once each, and brought into float32 and into the second-level cache, where the
// entries ask for rows in any order. Sums are float32.
//
// Deterministic: a thread makes whole columns, or whole entries, and the order of additions depends on S and the sizes
// alone.
#pragma once

#include <algorithm>
#include <utility>

#include "team.h"
#include "vector.h"

namespace {

constexpr int kStripVectors = 8;  // of a block: their sums are in registers
constexpr int64_t kStripColumns = kStripVectors * kLanes;
constexpr int64_t kBlockRows = (512 << 10) / (kStripColumns * 4);  // half of a second-level cache

// A dense matrix [rows, columns].
template <class W>
struct Dense {
  const typename W::Type* at;
  int64_t row, column;  // strides

  // n rows from `first` on, of which the `width` columns from `begin` on, and zeros, to [n, kStripColumns].
  void pack(int64_t first, int64_t n, int64_t begin, int64_t width, float* to) const {
    constexpr int64_t kTile = 16;  // rows, of which a cache line has a column
    const auto* const from = at + first * row + begin * column;
    if (width < kStripColumns) std::memset(to, 0, n * kStripColumns * sizeof *to);
    if (column == 1) {
      for (int64_t i = 0; i < n; ++i) {
        float* const own = to + i * kStripColumns;
        int64_t j = 0;
        for (; j + kLanes <= width; j += kLanes) *reinterpret_cast<VecLoose*>(own + j) = W::lanes(from + i * row + j);
        for (; j < width; ++j) own[j] = W::widen(from[i * row + j]);
      }
      return;
    }
    for (int64_t tile = 0; tile < n; tile += kTile)
      for (int64_t j = 0; j < width; ++j)
        for (int64_t i = tile; i < std::min(tile + kTile, n); ++i)
          to[i * kStripColumns + j] = W::widen(from[i * row + j * column]);
  }
};

// Row r has the entries start[r] … start[r + 1], by ascending columns.
//
// A product meets them by blocks of columns, and in these by rows, once for each strip of the other matrix. So they are put
// into that order first: else every row begins on another page, and to find pages takes a tenth to a fifth of the time.
struct Sparse {
  int64_t R, C;
  const int64_t* start;   // [R + 1]
  const int32_t* column;  // [entries]

  // Set by carve(), filled by order().
  int64_t* cuts;   // [blocks * R + 1]: where in that order the entries of each row start
  int32_t* place;  // [entries]: the row in its block of the other matrix
  float* value;    // [terms, entries]

  int64_t blocks() const { return (C + kBlockRows - 1) / kBlockRows; }

  float* values(int term) const { return value + term * start[R]; }

  void carve(Carver& take, int terms) {
    take(cuts, blocks() * R + 1);
    take(place, start[R]);
    take(value, terms * start[R]);
  }

  void order(int threads) const {
    each(threads, [&](int64_t* cut, int64_t, int64_t, int64_t n) { cut[1] = n; });
    cuts[0] = 0;
    for (int64_t i = 0; i < blocks() * R; ++i) cuts[i + 1] += cuts[i];
    each(threads, [&](const int64_t* cut, int64_t block, int64_t first, int64_t n) {
      for (int64_t i = 0; i < n; ++i) place[*cut + i] = int32_t(column[first + i] - block * kBlockRows);
    });
  }

  void take(int term, const float* own, int threads) const {
    each(threads, [&](const int64_t* cut, int64_t, int64_t first, int64_t n) {
      std::memcpy(values(term) + *cut, own + first, n * sizeof *own);
    });
  }

  void give(float* own, int threads) const {
    each(threads, [&](const int64_t* cut, int64_t, int64_t first, int64_t n) {
      std::memcpy(own + first, value + *cut, n * sizeof *own);
    });
  }

 private:
  // Calls work(its cut, block, first entry, how many) for each row in each block.
  template <class Work>
  void each(int threads, Work work) const {
    constexpr int64_t kRows = 64;
    Pieces pieces((R + kRows - 1) / kRows);
    together(threads, [&](Worker&) {
      pieces.share([&](int64_t piece) {
        for (int64_t r = piece * kRows; r < std::min(piece * kRows + kRows, R); ++r) {
          int64_t k = start[r];
          for (int64_t block = 0; block < blocks(); ++block) {
            const int64_t first = k;
            while (k < start[r + 1] && column[k] < (block + 1) * kBlockRows) ++k;
            work(cuts + block * R + r, block, first, k - first);
          }
        }
      });
    });
  }
};

// Sums of kLanes vectors, in their order.
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define HFS_SUMS
// Of each stretch of so many lanes in a, then in b, the sum of its halves.
template <int Length, int... I>
Vec halved(Vec a, Vec b, std::integer_sequence<int, I...>) {
  constexpr int kHalf = Length / 2;
  return __builtin_shufflevector(a, b, (I / kHalf * Length + I % kHalf)...) +
         __builtin_shufflevector(a, b, (I / kHalf * Length + I % kHalf + kHalf)...);
}

template <int Length>
Vec sums_of(Vec* v) {
  for (int i = 0; i < Length / 2; ++i)
    v[i] = halved<Length>(v[2 * i], v[2 * i + 1], std::make_integer_sequence<int, kLanes>());
  if constexpr (Length > 2) return sums_of<Length / 2>(v);
  return v[0];
}
#endif
#endif
inline Vec sums(Vec* v) {
#if defined(HFS_SUMS)
  return sums_of<kLanes>(v);
#else
  Vec all;
  for (int i = 0; i < kLanes; ++i) all[i] = sum(v[i]);
  return all;
#endif
}

// y [R, N] = S b, and another one with the same places if there is one, and the bias; b [C, N].
template <class W>
struct SparseProduct {
  typedef typename W::Type Type;
  Sparse s;
  struct Term {
    const float* value;  // [entries]; null: no such term
    Dense<W> b;
  } terms[2];
  const Type* bias;  // [N], or null
  Type* y;
  int64_t y_row, y_column, N;

  // Set by carve().
  float* packed;  // [threads, kBlockRows, kStripColumns]
  float* sums;    // [threads, R, kStripColumns]

  int64_t carve(char* scratch, int threads) {
    Carver take{scratch};
    take(packed, threads * kBlockRows * kStripColumns);
    take(sums, threads * s.R * kStripColumns);
    s.carve(take, terms[1].value ? 2 : 1);
    return take.at - scratch;
  }

  void run(int threads) const {
    s.order(threads);
    for (int term = 0; term < 2; ++term)
      if (terms[term].value) s.take(term, terms[term].value, threads);
    Pieces strips((N + kStripColumns - 1) / kStripColumns);
    together(threads, [&](Worker& me) {
      float* const rows = packed + me.index * kBlockRows * kStripColumns;
      float* const own = sums + me.index * s.R * kStripColumns;
      strips.share([&](int64_t strip) {
        const int64_t begin = strip * kStripColumns, width = std::min(N - begin, kStripColumns);
        std::memset(own, 0, s.R * kStripColumns * sizeof *own);
        for (int term = 0; term < 2 && terms[term].value; ++term)
          for (int64_t block = 0; block < s.blocks(); ++block) {
            const int64_t first = block * kBlockRows;
            terms[term].b.pack(first, std::min(s.C - first, kBlockRows), begin, width, rows);
            if (width <= kStripColumns / 2) add<kStripVectors / 2>(term, block, rows, own);
            else add<kStripVectors>(term, block, rows, own);
          }
        give(own, begin, width);
      });
    });
  }

 private:
  static constexpr int64_t kSome = 128;

  template <int V>
  void add(int term, int64_t block, const float* rows, float* own) const {
    const int64_t* const cuts = s.cuts + block * s.R;
    const float* const value = s.values(term);
    for (int64_t r = 0; r < s.R; ++r) {
      // Some at a time, so that rounding errors do not add up over all entries.
      for (int64_t k = cuts[r]; k < cuts[r + 1];) {
        Vec part[V] = {};
        for (const int64_t end = std::min(k + kSome, cuts[r + 1]); k < end; ++k) {
          const float* const row = rows + s.place[k] * kStripColumns;
          for (int i = 0; i < V; ++i) part[i] += value[k] * *reinterpret_cast<const Vec*>(row + i * kLanes);
        }
        for (int i = 0; i < V; ++i) *reinterpret_cast<Vec*>(own + r * kStripColumns + i * kLanes) += part[i];
      }
    }
  }

  // The columns from `begin` on of y, of which there are `width`.
  void give(const float* own, int64_t begin, int64_t width) const {
    constexpr int64_t kTile = 16;  // rows, which lie in one cache line where y is stored by columns
    float offset[kStripColumns] = {};
    if (bias)
      for (int64_t j = 0; j < width; ++j) offset[j] = W::widen(bias[begin + j]);
    const auto round = [&](int64_t r, int64_t j) {
      y[r * y_row + (begin + j) * y_column] = W::narrow(own[r * kStripColumns + j] + offset[j]);
    };
    for (int64_t tile = 0; tile < s.R; tile += kTile) {
      const int64_t end = std::min(tile + kTile, s.R);
      if (y_column == 1)
        for (int64_t r = tile; r < end; ++r)
          for (int64_t j = 0; j < width; ++j) round(r, j);
      else
        for (int64_t j = 0; j < width; ++j)
          for (int64_t r = tile; r < end; ++r) round(r, j);
    }
  }
};

// value [entries] = those of a bᵀ; a [R, N], b [C, N].
template <class W>
struct SampledProduct {
  Sparse s;
  Dense<W> a, b;
  float* value;
  int64_t N;

  float* packed;  // [threads, kBlockRows, kStripColumns], set by carve()

  int64_t carve(char* scratch, int threads) {
    Carver take{scratch};
    take(packed, threads * kBlockRows * kStripColumns);
    s.carve(take, 1);
    return take.at - scratch;
  }

  void run(int threads) const {
    s.order(threads);
    Pieces blocks(s.blocks());
    together(threads, [&](Worker& me) {
      float* const rows = packed + me.index * kBlockRows * kStripColumns;
      blocks.share([&](int64_t block) {
        const int64_t first = block * kBlockRows;
        const int64_t* const cuts = s.cuts + block * s.R;
        for (int64_t begin = 0; begin < N; begin += kStripColumns) {
          const int64_t width = std::min(N - begin, kStripColumns);
          b.pack(first, std::min(s.C - first, kBlockRows), begin, width, rows);
          for (int64_t r = 0; r < s.R; ++r) {
            if (cuts[r] == cuts[r + 1]) continue;
            alignas(kBytes) float own[kStripColumns];
            a.pack(r, 1, begin, width, own);
            for (int64_t k = cuts[r]; k < cuts[r + 1]; k += kLanes)
              add(own, rows, k, std::min(cuts[r + 1] - k, int64_t(kLanes)), begin == 0);
          }
        }
      });
    });
    s.give(value, threads);
  }

 private:
  static constexpr int kAtOnce = 8;  // entries: their rows and sums are in registers

  void add(const float* own, const float* rows, int64_t k, int64_t n, bool fresh) const {
    Vec part[kLanes] = {};
    for (int64_t i = 0; i < n; i += kAtOnce) {
      const float* row[kAtOnce];
      for (int e = 0; e < kAtOnce; ++e) row[e] = rows + s.place[k + std::min(i + e, n - 1)] * kStripColumns;
      Vec some[kAtOnce] = {};
      for (int64_t j = 0; j < kStripColumns; j += kLanes) {
        const Vec x = *reinterpret_cast<const Vec*>(own + j);
        for (int e = 0; e < kAtOnce; ++e) some[e] += x * *reinterpret_cast<const Vec*>(row[e] + j);
      }
      for (int e = 0; e < kAtOnce && i + e < kLanes; ++e) part[i + e] = some[e];
    }
    const Vec all = ::sums(part);
    for (int64_t i = 0; i < n; ++i) s.value[k + i] = fresh ? all[i] : s.value[k + i] + all[i];
  }
};

}  // namespace
