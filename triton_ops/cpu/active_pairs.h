// Which neurons are active for which tokens, as a sparse matrix: found, and transposed.
#pragma once

#include <algorithm>

#include "team.h"
#include "vector.h"

namespace {

// Of silent [R, C] the places of zeros, row by row, and what p has there.
template <class W>
struct Find {
  typedef typename W::Type Type;
  const uint8_t* silent;
  const Type* p;
  int64_t* start;   // [R + 1]
  int32_t* column;  // [entries], or null: then only start is found
  Type* kept;       // [entries]
  int64_t R, C;

  void run(int threads) const {
    constexpr int64_t kRows = 16;
    Pieces pieces((R + kRows - 1) / kRows);
    together(threads, [&](Worker&) {
      pieces.share([&](int64_t piece) {
        for (int64_t r = piece * kRows; r < std::min(piece * kRows + kRows, R); ++r) column ? list(r) : count(r);
      });
    });
    if (column) return;
    start[0] = 0;
    for (int64_t r = 0; r < R; ++r) start[r + 1] += start[r];
  }

 private:
  void count(int64_t r) const {
    const uint8_t* const own = silent + r * C;
    int64_t n = 0;
    for (int64_t j = 0; j < C; ++j) n += !own[j];
    start[r + 1] = n;
  }

  void list(int64_t r) const {
    constexpr int64_t kWord = 8;
    const uint8_t* const own = silent + r * C;
    int64_t k = start[r];
    const auto look = [&](int64_t j) {
      if (own[j]) return;
      column[k] = int32_t(j);
      kept[k++] = p[r * C + j];
    };
    int64_t j = 0;
    for (; j + kWord <= C; j += kWord) {
      uint64_t word;
      std::memcpy(&word, own + j, kWord);
      if (word != 0x0101010101010101u)
        for (int64_t i = 0; i < kWord; ++i) look(j + i);
    }
    for (; j < C; ++j) look(j);
  }
};

// Of the entries of S [R, C] by rows those of the transposed, and the place of each in S.
struct Transposition {
  int64_t R, C;
  const int64_t* start;   // [R + 1]
  const int32_t* column;  // [entries]
  int64_t* ends;          // [C + 1]: its start
  int32_t* row;           // [entries]: its column
  int32_t* place;         // [entries]

  void run() const {
    std::fill(ends, ends + C + 1, 0);
    for (int64_t k = 0; k < start[R]; ++k) ++ends[column[k]];
    for (int64_t c = 0, before = 0; c <= C; ++c) {
      const int64_t own = ends[c];
      ends[c] = before, before += own;
    }
    for (int64_t r = 0; r < R; ++r)
      for (int64_t k = start[r]; k < start[r + 1]; ++k) {
        const int64_t at = ends[column[k]]++;
        row[at] = int32_t(r), place[at] = int32_t(k);
      }
    // Each is now where the next one starts.
    for (int64_t c = C; c > 0; --c) ends[c] = ends[c - 1];
    ends[0] = 0;
  }
};

}  // namespace
