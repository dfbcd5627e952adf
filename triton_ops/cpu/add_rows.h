// The down projection of a block of neurons: weighted rows added to float32 outputs.
#pragma once

#include "vector.h"

namespace {

// y (+)= h[0] * rows[0] + … + h[R-1] * rows[R-1] in columns begin … end - 1, added one after the other. Apart: these rows
// have a sum of their own first, so that many rows round less often on the way.
template <class W, int R, bool Apart>
void axpy(float* y, const typename W::Type* const* rows, const float* h, int64_t begin, int64_t end, bool fresh) {
  int64_t i = begin;
  for (; i + kStep <= end; i += kStep) {
    Vec before_a = {}, before_b = {};
    if (!fresh) Float32::load(y + i, before_a, before_b);
    Vec ya = {}, yb = {};
    if (!Apart) ya = before_a, yb = before_b;
    for (int r = 0; r < R; ++r) {
      Vec a, b;
      W::load(rows[r] + i, a, b);
      ya += h[r] * a;
      yb += h[r] * b;
    }
    if (Apart) ya += before_a, yb += before_b;
    Float32::store(y + i, ya, yb);
  }
  for (; i < end; ++i) {
    const float before = fresh ? 0.0f : y[i];
    float s = Apart ? 0.0f : before;
    for (int r = 0; r < R; ++r) s += h[r] * W::widen(rows[r][i]);
    y[i] = Apart ? before + s : s;
  }
}

// The same for n rows; apart: eight by eight. fresh: y holds nothing yet.
template <class W, bool Apart = false>
void add_rows(float* y, const typename W::Type* const* rows, const float* h, int64_t n, int64_t begin, int64_t end,
              bool fresh) {
  int64_t r = 0;
  for (; r + 8 <= n; r += 8, fresh = false) axpy<W, 8, Apart>(y, rows + r, h + r, begin, end, fresh);
  if (r + 4 <= n) axpy<W, 4, Apart>(y, rows + r, h + r, begin, end, fresh), r += 4, fresh = false;
  if (r + 2 <= n) axpy<W, 2, Apart>(y, rows + r, h + r, begin, end, fresh), r += 2, fresh = false;
  if (r < n) axpy<W, 1, Apart>(y, rows + r, h + r, begin, end, fresh);
}

}  // namespace
