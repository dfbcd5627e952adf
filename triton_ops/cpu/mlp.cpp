// One pass over the neurons of an MLP: gate dot product, activation test, and only for active neurons the up
// dot product and the addition of the down row to the output. What silent neurons own is not read.
//
// A plain C interface, called through ctypes, so that one binary serves every version of torch.
//
// Shapes: T tokens, D hidden size, F neurons. The weights hold one neuron per contiguous row of D elements.
// Weights are streamed once and everything else stays in cache, so time is bytes of weights read / bandwidth.
//
// Deterministic: F is cut into fixed groups (independent of the number of threads); threads take whole groups
// in any order, each group sums its neurons in order into its own partial output, and partial outputs are
// added in order. The sum of a token does not depend on which other tokens are in the call either.

#include <atomic>
#include <cstdint>
#include <cstring>

namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
constexpr int kLanes = kBytes / 4;
constexpr int64_t kStep = 2 * kLanes;  // elements that one load() turns into two float vectors

typedef float Vec __attribute__((vector_size(kBytes)));
typedef uint32_t Bits __attribute__((vector_size(kBytes)));
typedef int32_t Mask __attribute__((vector_size(kBytes)));
// Rows of odd length start at any element, hence the relaxed alignment.
typedef float VecLoose __attribute__((vector_size(kBytes), aligned(4), may_alias));
typedef uint32_t BitsLoose __attribute__((vector_size(kBytes), aligned(2), may_alias));

constexpr int64_t kBlock = 128;     // neurons whose gates are computed before any up row is read
constexpr int64_t kMinGroup = 128;  // neurons; the last groups are small so that no thread waits long
constexpr int64_t kGroupShare = 32;
constexpr int64_t kMaxTokens = 8;
constexpr int kAhead = 4;  // rows that dots() works on at most; every list has as many more pointers

// A hardware prefetcher stops at the end of a page, which is about one row. So while dots() works on rows r …
// r + R - 1 of a list, it fetches the same place of rows r + R … r + 2R - 1: a fifth faster on one core.
template <class Type>
void fetch(const Type* p, int64_t bytes) {
  for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(reinterpret_cast<const char*>(p) + b);
}

struct Float32 {
  typedef float Type;
  static void load(const float* p, Vec& a, Vec& b) {
    a = *reinterpret_cast<const VecLoose*>(p);
    b = *reinterpret_cast<const VecLoose*>(p + kLanes);
  }
  static void store(float* p, Vec a, Vec b) {
    *reinterpret_cast<VecLoose*>(p) = a;
    *reinterpret_cast<VecLoose*>(p + kLanes) = b;
  }
  static float widen(float v) { return v; }
  static float narrow(float v) { return v; }
};

// Two neighbouring bfloat16 share a 32-bit lane: the even elements become vector a, the odd ones b.
struct BFloat16 {
  typedef uint16_t Type;
  static void load(const uint16_t* p, Vec& a, Vec& b) {
    const Bits v = *reinterpret_cast<const BitsLoose*>(p);
    a = reinterpret_cast<Vec>(v << 16);
    b = reinterpret_cast<Vec>(v & 0xffff0000u);
  }
  static Bits round(Vec v) {  // to nearest even, in the upper half of each lane; NaN stays NaN
    const Bits u = reinterpret_cast<Bits>(v);
    const Bits nearest = u + 0x7fffu + ((u >> 16) & 1u);
    const Mask is_nan = v != v;
    return reinterpret_cast<Bits>(is_nan ? reinterpret_cast<Mask>(u | 0x400000u)
                                         : reinterpret_cast<Mask>(nearest)) & 0xffff0000u;
  }
  static void store(uint16_t* p, Vec a, Vec b) {
    *reinterpret_cast<BitsLoose*>(p) = (round(a) >> 16) | round(b);
  }
  static float widen(uint16_t v) {
    const uint32_t u = uint32_t(v) << 16;
    float f;
    std::memcpy(&f, &u, 4);
    return f;
  }
  static uint16_t narrow(float f) {
    uint32_t u;
    std::memcpy(&u, &f, 4);
    if (f != f) return uint16_t((u | 0x400000u) >> 16);
    return uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
  }
};

// The dense computation rounds every pre-activation and every h to the dtype of the model; doing the same
// here makes both select the same neurons.
template <class W>
float rounded(float v) {
  return W::widen(W::narrow(v));
}

// Numbers as in triton_ops/cpu/path.py.
enum Activation { kRelu, kRelu2, kJSRelu, kShifted, kFat, kDRelu };

// Written so that NaN counts as active.
bool silent(float p, int kind, float threshold) {
  return kind == kFat ? p < threshold : p <= threshold;
}

template <class W>
float activated(float p, int kind, float threshold) {
  switch (kind) {
    case kRelu2: return p * p;
    case kJSRelu: return p + 0.5f * rounded<W>(p * p);
    case kShifted: return p - threshold;
    default: return p;
  }
}

float sum(Vec v) {
  float s[kLanes];
  std::memcpy(s, &v, sizeof v);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) s[i] += s[i + width];
  return s[0];
}

int64_t padded(int64_t D) { return (D + kStep - 1) / kStep * kStep; }

// The last D % kStep elements of a row that ends at `row + D`, followed by zeros.
template <class W>
void load_tail(const typename W::Type* row, int64_t i, int64_t D, Vec& a, Vec& b) {
  typename W::Type tail[kStep] = {};
  std::memcpy(tail, row + i, (D - i) * sizeof tail[0]);
  W::load(tail, a, b);
}

// x as float, in the order in which load() delivers weights, with zeros up to padded(D).
template <class W>
void widen_row(const typename W::Type* x, float* out, int64_t D) {
  Vec a, b;
  int64_t i = 0;
  for (; i + kStep <= D; i += kStep) {
    W::load(x + i, a, b);
    Float32::store(out + i, a, b);
  }
  if (i == D) return;
  load_tail<W>(x, i, D, a, b);
  Float32::store(out + i, a, b);
}

// out[r * kMaxTokens + t] = rows[r] . x[t] for R rows and N tokens; the order of additions in one dot product
// does not depend on R or N. First: these rows are not in the cache, and the next R are fetched.
template <class W, int R, int N, bool First>
void dots(const typename W::Type* const* rows, const float* x, int64_t D, float* out) {
  const int64_t x_stride = padded(D);
  Vec acc[R][N][2] = {}, xa[N], xb[N], a, b;
  int64_t i = 0;
  for (; i + kStep <= D; i += kStep) {
    for (int t = 0; t < N; ++t) Float32::load(x + t * x_stride + i, xa[t], xb[t]);
    for (int r = 0; r < R; ++r) {
      W::load(rows[r] + i, a, b);
      if (First) fetch(rows[r + R] + i, kStep * sizeof(typename W::Type));
      for (int t = 0; t < N; ++t) {
        acc[r][t][0] += a * xa[t];
        acc[r][t][1] += b * xb[t];
      }
    }
  }
  if (i < D) {
    for (int t = 0; t < N; ++t) Float32::load(x + t * x_stride + i, xa[t], xb[t]);
    for (int r = 0; r < R; ++r) {
      load_tail<W>(rows[r], i, D, a, b);
      for (int t = 0; t < N; ++t) {
        acc[r][t][0] += a * xa[t];
        acc[r][t][1] += b * xb[t];
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int t = 0; t < N; ++t) out[r * kMaxTokens + t] = sum(acc[r][t][0] + acc[r][t][1]);
}

template <class W, int R>
void dots_tokens(const typename W::Type* const* rows, const float* x, int64_t T, int64_t D, float* out) {
  if (T == 1) return dots<W, R, 1, true>(rows, x, D, out);
  if (T == 2) return dots<W, R, 2, true>(rows, x, D, out);
  if (T == 3) return dots<W, R, 3, true>(rows, x, D, out);
  dots<W, R, 4, true>(rows, x, D, out);
  if (T == 4) return;
  x += 4 * padded(D), out += 4, T -= 4;  // the rows are in the cache now
  if (T == 1) return dots<W, R, 1, false>(rows, x, D, out);
  if (T == 2) return dots<W, R, 2, false>(rows, x, D, out);
  if (T == 3) return dots<W, R, 3, false>(rows, x, D, out);
  dots<W, R, 4, false>(rows, x, D, out);
}

// out[r * kMaxTokens + t] = rows[r] . x[t] for n rows; rows[n] … rows[n + kAhead - 1] are needed next.
template <class W>
void all_dots(const typename W::Type* const* rows, int64_t n, const float* x, int64_t T, int64_t D,
              float* out) {
  int64_t r = 0;
  if (T <= 2)  // with more tokens, the sums of four rows do not fit the registers
    for (; r + 4 <= n; r += 4) dots_tokens<W, 4>(rows + r, x, T, D, out + r * kMaxTokens);
  for (; r + 2 <= n; r += 2) dots_tokens<W, 2>(rows + r, x, T, D, out + r * kMaxTokens);
  if (r < n) dots_tokens<W, 1>(rows + r, x, T, D, out + r * kMaxTokens);
}

// y (+)= h[0] * rows[0] + … + h[R-1] * rows[R-1], added one after the other.
template <class W, int R>
void axpy(float* y, const typename W::Type* const* rows, const float* h, int64_t D, bool fresh) {
  int64_t i = 0;
  for (; i + kStep <= D; i += kStep) {
    Vec ya = {}, yb = {};
    if (!fresh) Float32::load(y + i, ya, yb);
    for (int r = 0; r < R; ++r) {
      Vec a, b;
      W::load(rows[r] + i, a, b);
      ya += h[r] * a;
      yb += h[r] * b;
    }
    Float32::store(y + i, ya, yb);
  }
  for (; i < D; ++i) {
    float s = fresh ? 0.0f : y[i];
    for (int r = 0; r < R; ++r) s += h[r] * W::widen(rows[r][i]);
    y[i] = s;
  }
}

// Adds n rows to the partial output y; written says whether y holds anything yet (it starts uninitialised).
template <class W>
void add_rows(float* y, int32_t& written, const typename W::Type* const* rows, const float* h, int64_t n,
              int64_t D) {
  int64_t r = 0;
  auto next = [&](int step) {
    r += step;
    written = 1;
  };
  while (r + 8 <= n) axpy<W, 8>(y, rows + r, h + r, D, !written), next(8);
  if (r + 4 <= n) axpy<W, 4>(y, rows + r, h + r, D, !written), next(4);
  if (r + 2 <= n) axpy<W, 2>(y, rows + r, h + r, D, !written), next(2);
  if (r < n) axpy<W, 1>(y, rows + r, h + r, D, !written), next(1);
}

// End of the group that starts at neuron `begin`: a fixed share of what is left, at least kMinGroup.
int64_t group_end(int64_t begin, int64_t F) {
  const int64_t left = F - begin;
  int64_t size = (left / kGroupShare + kBlock - 1) / kBlock * kBlock;
  if (size < kMinGroup) size = kMinGroup;
  return size < left ? begin + size : F;
}

int64_t count_groups(int64_t F) {
  int64_t n = 0;
  for (int64_t begin = 0; begin < F; begin = group_end(begin, F)) ++n;
  return n;
}

template <class W>
struct Job {
  typedef typename W::Type Type;
  const Type *x, *gate, *up, *down, *gate_bias, *up_bias, *down_bias;
  Type* y;
  int64_t T, D, F, gate_stride, up_stride, down_stride;
  int kind;
  float threshold;
  int64_t groups;
  float* wide;       // [T, padded(D)] x as float
  float* partial;    // [groups, T, D]
  int32_t* written;  // [groups, T]
  int64_t* begins;   // [groups + 1]

  // h[t] of neurons begin … begin + n - 1 into h[i * kMaxTokens + t], for a gated MLP.
  void gated_block(int64_t begin, int64_t n, float* h) const {
    const Type* rows[kBlock + kAhead];
    float u[kBlock * kMaxTokens];
    int64_t active[kBlock] = {0}, count = 0;
    for (int64_t i = 0; i < n + kAhead; ++i)
      rows[i] = gate + (begin + i < F ? begin + i : F - 1) * gate_stride;
    all_dots<W>(rows, n, wide, T, D, h);
    for (int64_t i = 0; i < n; ++i) {
      const float bias = gate_bias ? W::widen(gate_bias[begin + i]) : 0.0f;
      bool any = false;
      for (int64_t t = 0; t < T; ++t) {
        float& p = h[i * kMaxTokens + t];
        p = rounded<W>(p + bias);
        if (silent(p, kind, threshold))
          p = 0.0f;
        else
          p = rounded<W>(activated<W>(p, kind, threshold)), any = true;
      }
      if (any) active[count] = i, rows[count++] = up + (begin + i) * up_stride;
    }
    for (int64_t k = 0; k < kAhead; ++k)
      rows[count + k] = down + (begin + active[k < count ? k : 0]) * down_stride;
    all_dots<W>(rows, count, wide, T, D, u);
    for (int64_t k = 0; k < count; ++k) {
      const int64_t i = active[k];
      const float bias = up_bias ? W::widen(up_bias[begin + i]) : 0.0f;
      for (int64_t t = 0; t < T; ++t) {
        float& a = h[i * kMaxTokens + t];
        if (a == 0.0f) continue;
        const float v = rounded<W>(u[k * kMaxTokens + t] + bias);
        a = kind == kDRelu && v <= 0.0f ? 0.0f : rounded<W>(a * v);
      }
    }
  }

  void given_block(int64_t begin, int64_t n, float* h) const {
    for (int64_t i = 0; i < n; ++i)
      for (int64_t t = 0; t < T; ++t) h[i * kMaxTokens + t] = W::widen(x[t * F + begin + i]);
  }

  void run_group(int64_t g) const {
    const Type* rows[kBlock];
    float h[kBlock * kMaxTokens], own[kBlock];
    for (int64_t t = 0; t < T; ++t) written[g * T + t] = 0;
    for (int64_t begin = begins[g]; begin < begins[g + 1]; begin += kBlock) {
      const int64_t n = begins[g + 1] - begin < kBlock ? begins[g + 1] - begin : kBlock;
      if (gate)
        gated_block(begin, n, h);
      else
        given_block(begin, n, h);
      // Token by token: the second token that needs a row finds it in the cache.
      for (int64_t t = 0; t < T; ++t) {
        int64_t count = 0;
        for (int64_t i = 0; i < n; ++i)
          if (h[i * kMaxTokens + t] != 0.0f)
            own[count] = h[i * kMaxTokens + t], rows[count++] = down + (begin + i) * down_stride;
        add_rows<W>(partial + (g * T + t) * D, written[g * T + t], rows, own, count, D);
      }
    }
  }

  // Columns begin … end - 1 (begin a multiple of kStep) of token t: partial outputs in order, bias, rounding.
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
      y[t * D + i] = W::narrow(s + (down_bias ? W::widen(down_bias[i]) : 0.0f));
    }
  }

  void run(int threads) const {
    if (gate)
      for (int64_t t = 0; t < T; ++t) widen_row<W>(x + t * D, wide + t * padded(D), D);
    begins[0] = 0;
    for (int64_t g = 0; g < groups; ++g) begins[g + 1] = group_end(begins[g], F);
    const int64_t columns = 8 * kStep, pieces = (D + columns - 1) / columns;
    std::atomic<int64_t> next{0};
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
      for (int64_t g; (g = next.fetch_add(1, std::memory_order_relaxed)) < groups;) run_group(g);
#pragma omp barrier
#pragma omp for schedule(static) nowait
      for (int64_t k = 0; k < T * pieces; ++k) {
        const int64_t begin = k % pieces * columns;
        reduce(k / pieces, begin, begin + columns < D ? begin + columns : D);
      }
    }
  }
};

// In floats: x, partial outputs, their flags, group boundaries (8 bytes each, first, for alignment).
template <class W>
void carve(Job<W>& job, float* scratch) {
  job.groups = count_groups(job.F);
  job.begins = reinterpret_cast<int64_t*>(scratch);
  job.wide = scratch + 2 * (job.groups + 1);
  job.partial = job.wide + job.T * padded(job.D);
  job.written = reinterpret_cast<int32_t*>(job.partial + job.groups * job.T * job.D);
}

}  // namespace

extern "C" {

int64_t hfs_max_tokens() { return kMaxTokens; }

// Number of floats that the scratch argument must hold.
int64_t hfs_scratch(int64_t T, int64_t D, int64_t F) {
  const int64_t groups = count_groups(F);
  return 2 * (groups + 1) + T * padded(D) + groups * T * D + groups * T;
}

// y [T, D] from x [T, D]; with gate == nullptr, x is h [T, F] and only the down projection is done.
// dtype: 0 float32, 1 bfloat16. Strides count elements between neurons. T <= hfs_max_tokens().
void hfs_mlp(int dtype, const void* x, const void* gate, const void* up, const void* down,
             const void* gate_bias, const void* up_bias, const void* down_bias, void* y, float* scratch,
             int64_t T, int64_t D, int64_t F, int64_t gate_stride, int64_t up_stride, int64_t down_stride,
             int kind, float threshold, int threads) {
  auto run = [&](auto w) {
    typedef decltype(w) W;
    typedef typename W::Type Type;
    Job<W> job = {(const Type*)x, (const Type*)gate, (const Type*)up, (const Type*)down,
                  (const Type*)gate_bias, (const Type*)up_bias, (const Type*)down_bias, (Type*)y,
                  T, D, F, gate_stride, up_stride, down_stride, kind, rounded<W>(threshold),
                  0, nullptr, nullptr, nullptr, nullptr};
    carve(job, scratch);
    job.run(threads);
  };
  if (dtype == 0)
    run(Float32{});
  else
    run(BFloat16{});
}
}
