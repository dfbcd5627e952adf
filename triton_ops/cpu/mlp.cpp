// The CPU kernels behind a plain C interface, called through ctypes, so that one binary serves every version of torch.
//
// Shapes: T tokens, D hidden size, F neurons. The weights hold one neuron per contiguous row of D elements.

#include "active_pairs.h"
#include "attention.h"
#include "calls.h"
#include "certifier.h"
#include "dense_linear.h"
#include "greedy_linear.h"
#include "one_pass.h"
#include "hidden_product.h"
#include "down_product.h"
#include "down_pairs.h"
#include "scratch.h"
#include "sparse_products.h"

// One certificate to be made.
struct CertifyCall {
  const void* w;                // [D, F], of which rows are contiguous
  void *q, *bounds;             // [D, F] and [D, 3]
  int64_t D, F, stride;         // between rows of w
  int32_t dtype, threads;
};
static_assert(sizeof(CertifyCall) == 6 * 8 + 2 * 4, "backend.py packs it by hand");

// The active pairs of a token and a neuron.
struct FindCall {
  const void *silent, *p;       // [R, C] bool, and of the dtype
  void *start, *column, *kept;  // [R + 1]; [entries] each, or null: then only start is found
  int64_t R, C;
  int32_t dtype, threads;
};
static_assert(sizeof(FindCall) == 7 * 8 + 2 * 4, "sparse_products.py packs it by hand");

struct TransposeCall {
  const void *start, *column;      // [R + 1], [entries]
  void *row_start, *row, *place;   // [C + 1], [entries], [entries]
  int64_t R, C;
};
static_assert(sizeof(TransposeCall) == 7 * 8, "sparse_products.py packs it by hand");

// A product with them, or the sum of two.
struct SparseProductCall {
  const int64_t* start;         // [R + 1]
  const int32_t* column;        // [entries]
  const float *value, *more;    // [entries], of which the second may be null
  const void *b, *other;        // [C, N]; what these and those are multiplied with
  const void* bias;             // [N], or null
  void* y;                      // [R, N]
  int64_t R, C, N, b_row, b_column, other_row, other_column, y_row, y_column;  // strides
  int32_t dtype, threads;
};
static_assert(sizeof(SparseProductCall) == 17 * 8 + 2 * 4, "sparse_products.py packs it by hand");

// The values that they have in a product.
struct SampledProductCall {
  const int64_t* start;         // [R + 1]
  const int32_t* column;        // [entries]
  const void *a, *b;            // [R, N], of which rows are contiguous; [C, N]
  float* value;                 // [entries]
  int64_t R, C, N, a_row, b_row, b_column;  // strides
  int32_t dtype, threads;
};
static_assert(sizeof(SampledProductCall) == 11 * 8 + 2 * 4, "sparse_products.py packs it by hand");

namespace {

constexpr int64_t kManyTokens = 8;   // from here on the down projection may be a matrix product …
constexpr int64_t kGateTokens = 16;  // … and here the gate is one
static_assert(kGateTokens <= kMaxTokens, "up to there all tokens are worked on at once");
// At once, so that intermediate values do not grow with T, and are few enough to be kept (scratch.h).
template <class W>
constexpr int64_t kMostTokens = 256 * Step<W>::kRows;

// Calls run(first, count) for equal parts of T, of at most `most`.
template <class Run>
void in_parts(int64_t T, int64_t most, Run run) {
  const int64_t parts = (T + most - 1) / most;
  for (int64_t i = 0; i < parts; ++i) run(i * T / parts, (i + 1) * T / parts - i * T / parts);
}

// One part of a call: with scratch it runs, without it only counts the bytes that it needs.
template <class Job>
void run_part(Job job, int threads, char* scratch, int64_t& bytes) {
  const int64_t own = job.carve(scratch, threads);
  bytes = std::max(bytes, own);
  if (scratch) job.run(threads);
}

// Down projection of h [T, F] for many tokens: pair by pair of token and active neuron, if these are few, else as a
// product.
template <class W>
void project(const Fused<W>& mlp, const typename W::Type* h, int threads, char* scratch, int64_t& bytes) {
  Linear<W> linear = {};
  linear.h = h, linear.w = mlp.down, linear.bias = mlp.down_bias, linear.y = mlp.y;
  linear.T = mlp.T, linear.D = mlp.D, linear.F = mlp.F, linear.stride = mlp.down_stride;
  bytes = std::max(bytes, linear.carve(scratch, threads));
  const double pairs = scratch ? linear.find(threads) : 0.0;
  // The product is over the neurons that any token needs.
  const bool few = scratch && pairs < Step<W>::kDensity * double(linear.gemm.K);
  if (few || !scratch)
    in_parts(mlp.T, Pairs<W>::kMaxT, [&](int64_t first, int64_t n) {
      Pairs<W> job = {};
      job.h = h + first * mlp.F, job.w = mlp.down, job.bias = mlp.down_bias, job.y = mlp.y + first * mlp.D;
      job.T = n, job.D = mlp.D, job.F = mlp.F, job.stride = mlp.down_stride;
      run_part(job, threads, scratch, bytes);
    });
  if (scratch && !few) linear.run(threads);
}

// h [T, F] of many tokens.
template <class W>
void activate(const Fused<W>& mlp, typename W::Type* h, int threads, char* scratch, int64_t& bytes) {
  if (mlp.T < kGateTokens) {
    Fused<W> part = mlp;
    part.stores = true, part.hidden = h;
    return run_part(part, threads, scratch, bytes);
  }
  Hidden<W> hidden = {};
  hidden.x = mlp.x, hidden.gate = mlp.gate, hidden.up = mlp.up, hidden.h = h;
  hidden.gate_bias = mlp.gate_bias, hidden.up_bias = mlp.up_bias, hidden.T = mlp.T, hidden.D = mlp.D, hidden.F = mlp.F;
  hidden.gate_stride = mlp.gate_stride, hidden.up_stride = mlp.up_stride;
  hidden.kind = mlp.kind, hidden.threshold = mlp.threshold, hidden.thresholds = mlp.thresholds;
  run_part(hidden, threads, scratch, bytes);
}

template <class W>
int64_t run(const Fused<W>& mlp, int threads, char* scratch) {
  int64_t bytes = 0, before = 0;
  if (mlp.T < kManyTokens) {
    run_part(mlp, threads, scratch, bytes);
    return bytes;
  }
  in_parts(mlp.T, kMostTokens<W>, [&](int64_t first, int64_t n) {
    Fused<W> part = mlp;
    part.T = n, part.y += first * mlp.D;
    if (!mlp.gate) return project(part, mlp.x + first * mlp.F, threads, scratch, bytes);
    part.x += first * mlp.D;
    Carver take{scratch};
    typename W::Type* h;
    take(h, n * mlp.F);
    before = std::max(before, take.at - scratch);
    char* const rest = scratch ? take.at : nullptr;
    activate(part, h, threads, rest, bytes);
    project(part, h, threads, rest, bytes);
  });
  return before + bytes;
}

// Calls work(scratch), at first with null for the bytes that it needs. Returns 1 where there is no memory for them.
template <class Work>
int with_scratch(Work work) {
  char* const scratch = take_scratch(size_t(work(nullptr)));
  if (!scratch) return 1;
  work(scratch);
  give_back_scratch(scratch);
  return 0;
}

template <class W, class Rows>
Fused<W, Rows> fused(const Call& call) {
  typedef typename W::Type Type;
  typedef typename Rows::Type Row;
  Fused<W, Rows> mlp = {};
  mlp.x = (const Type*)call.x, mlp.y = (Type*)call.y;
  mlp.gate = (const Row*)call.gate, mlp.up = (const Row*)call.up, mlp.down = (const Row*)call.down;
  mlp.gate_scales = call.gate_scales, mlp.up_scales = call.up_scales, mlp.down_scales = call.down_scales;
  mlp.gate_bias = (const Type*)call.gate_bias, mlp.up_bias = (const Type*)call.up_bias;
  mlp.down_bias = (const Type*)call.down_bias;
  if (call.T == 1) mlp.q = (const int8_t*)call.q, mlp.bounds = (const float*)call.bounds;
  mlp.T = call.T, mlp.D = call.D, mlp.F = call.F;
  mlp.gate_stride = call.gate_stride, mlp.up_stride = call.up_stride, mlp.down_stride = call.down_stride;
  mlp.kind = call.kind, mlp.threshold = rounded<W>(call.threshold), mlp.thresholds = (const Type*)call.thresholds;
  return mlp;
}

// With int8 rows: fixed(call) or floating(call), as is right for each token of x [T, inputs], whatever the others are.
template <class W, class Any, class Fixed, class Floating>
int by_inputs(Any call, int64_t inputs, Fixed fixed, Floating floating) {
  if constexpr (kFixed && std::is_same<W, BFloat16>::value) {
    const auto* const x = (const uint16_t*)call.x;
    auto* const y = (uint16_t*)call.y;
    int64_t count = 0;
    for (int64_t t = 0; t < call.T; ++t) count += may_be_fixed(x + t * inputs, inputs);
    if (count == call.T) return fixed(call);
    if (count) {
      const int64_t T = call.T;
      call.T = 1;
      for (int64_t t = 0; t < T; ++t) {
        call.x = x + t * inputs, call.y = y + t * call.D;
        if (may_be_fixed(x + t * inputs, inputs) ? fixed(call) : floating(call)) return 1;
      }
      return 0;
    }
  }
  return floating(call);
}

// A job that is one part.
template <class Job>
int run_whole(Job& job, int threads) {
  return with_scratch([&](char* scratch) {
    int64_t bytes = 0;
    run_part(job, threads, scratch, bytes);
    return bytes;
  });
}

template <class W>
int run(const Call& call) {
  const int threads = sensible(call.threads);
  if (call.down_scales) {
    const auto floating = [&](const Call& one) {
      auto mlp = fused<W, Int8>(one);
      return run_whole(mlp, threads);
    };
    const auto fixed = [&](const Call& one) {
      auto mlp = fused<W, Int8Fixed>(one);
      return run_whole(mlp, threads);
    };
    return call.gate ? by_inputs<W>(call, call.D, fixed, floating) : floating(call);
  }
  const auto mlp = fused<W, W>(call);
  return with_scratch([&](char* scratch) { return run(mlp, threads, scratch); });
}

template <class W, class Rows>
int run_rows(const LinearCall* calls, int64_t count) {
  typedef typename W::Type Type;
  DenseLinear<W, Rows> linear = {};
  linear.x = (const Type*)calls->x, linear.T = calls->T, linear.F = calls->F, linear.count = count;
  for (auto& of : linear) {
    const LinearCall& call = calls[&of - linear.begin()];
    of.w = (const typename Rows::Type*)call.w, of.bias = (const Type*)call.bias, of.scales = call.scales;
    of.y = (Type*)call.y, of.D = call.D, of.stride = call.stride;
  }
  return run_whole(linear, sensible(calls->threads));
}

template <class W>
int run(const LinearCall& call) {
  typedef typename W::Type Type;
  if (call.scales) {
    const auto fixed = [](const LinearCall& one) { return run_rows<W, Int8Fixed>(&one, 1); };
    const auto floating = [](const LinearCall& one) { return run_rows<W, Int8>(&one, 1); };
    return by_inputs<W>(call, call.F, fixed, floating);
  }
  if (call.q && call.T <= GreedyLinear<W>::kTokens) {
    GreedyLinear<W> linear = {};
    linear.x = (const Type*)call.x, linear.w = (const Type*)call.w, linear.bias = (const Type*)call.bias;
    linear.q = (const int8_t*)call.q, linear.bounds = (const float*)call.bounds, linear.y = (Type*)call.y;
    linear.T = call.T, linear.D = call.D, linear.F = call.F, linear.stride = call.stride;
    return run_whole(linear, sensible(call.threads));
  }
  if (call.columns) {
    Fused<W> linear = {};
    linear.x = (const Type*)call.x, linear.down = (const Type*)call.w, linear.down_bias = (const Type*)call.bias;
    linear.y = (Type*)call.y, linear.all = true;
    linear.T = call.T, linear.D = call.D, linear.F = call.F, linear.down_stride = call.stride;
    return run_whole(linear, sensible(call.threads));
  }
  return run_rows<W, W>(&call, 1);
}

template <class W>
int run(const LinearCalls& some) {
  return run_rows<W, W>(some.calls, some.count);
}

template <class W>
int run(const AttentionCall& call) {
  typedef typename W::Type Type;
  Attention<W> attention = {};
  attention.q = (const Type*)call.q, attention.k = (const Type*)call.k, attention.v = (const Type*)call.v;
  attention.shown = (const uint8_t*)call.shown, attention.added = (const Type*)call.added, attention.y = (Type*)call.y;
  attention.B = call.B, attention.H = call.H, attention.K = call.K;
  attention.L = call.L, attention.D = call.D, attention.V = call.V;
  attention.q_batch = call.q_batch, attention.q_head = call.q_head;
  attention.k_batch = call.k_batch, attention.k_head = call.k_head, attention.k_row = call.k_row;
  attention.v_batch = call.v_batch, attention.v_head = call.v_head, attention.v_row = call.v_row;
  attention.mask_batch = call.mask_batch, attention.scale = call.scale;
  return run_whole(attention, sensible(call.threads));
}

template <class W>
void run(const CertifyCall& call) {
  Certifier<W> certifier = {};
  certifier.w = (const typename W::Type*)call.w, certifier.q = (int8_t*)call.q, certifier.bounds = (float*)call.bounds;
  certifier.D = call.D, certifier.F = call.F, certifier.stride = call.stride;
  certifier.run(sensible(call.threads));
}

template <class W>
void run(const FindCall& call) {
  typedef typename W::Type Type;
  const Find<W> find = {(const uint8_t*)call.silent, (const Type*)call.p, (int64_t*)call.start, (int32_t*)call.column,
                        (Type*)call.kept, call.R, call.C};
  find.run(sensible(call.threads));
}

template <class W>
int run(const SparseProductCall& call) {
  typedef typename W::Type Type;
  const Dense<W> b = {(const Type*)call.b, call.b_row, call.b_column};
  const Dense<W> other = {(const Type*)call.other, call.other_row, call.other_column};
  SparseProduct<W> product = {{call.R, call.C, call.start, call.column}, {{call.value, b}, {call.more, other}},
                              (const Type*)call.bias, (Type*)call.y, call.y_row, call.y_column, call.N};
  return run_whole(product, sensible(call.threads));
}

template <class W>
int run(const SampledProductCall& call) {
  typedef typename W::Type Type;
  SampledProduct<W> product = {{call.R, call.C, call.start, call.column}, {(const Type*)call.a, call.a_row, 1},
                               {(const Type*)call.b, call.b_row, call.b_column}, call.value, call.N};
  return run_whole(product, sensible(call.threads));
}

template <class Any>
auto by_dtype(const Any& call) {
  return call.dtype == 0 ? run<Float32>(call) : call.dtype == 1 ? run<BFloat16>(call) : run<Float16>(call);
}

}  // namespace

// Returns 0, or 1 where there is no memory for intermediate values; y is then as it was. Weights in int8: for at most
// kMaxTokens tokens.
extern "C" int hfs_mlp(const Call* call) {
  return by_dtype(*call);
}

// The same for at most kTokens of DenseLinear and GreedyLinear; for at most kLinears weights.
extern "C" int hfs_linear(const LinearCall* call) {
  return by_dtype(*call);
}

extern "C" int hfs_linears(const LinearCalls* some) {
  return by_dtype(*some);
}

extern "C" int hfs_attention(const AttentionCall* call) {
  return by_dtype(*call);
}

extern "C" void hfs_certify(const CertifyCall* call) {
  by_dtype(*call);
}

extern "C" void hfs_find(const FindCall* call) {
  by_dtype(*call);
}

extern "C" void hfs_transpose(const TransposeCall* call) {
  const Transposition transposition = {call->R, call->C, (const int64_t*)call->start, (const int32_t*)call->column,
                                       (int64_t*)call->row_start, (int32_t*)call->row, (int32_t*)call->place};
  transposition.run();
}

// Returns 0, or 1 where there is no memory for the blocks of b; results are then as they were.
extern "C" int hfs_sparse_product(const SparseProductCall* call) {
  return by_dtype(*call);
}

extern "C" int hfs_sampled_product(const SampledProductCall* call) {
  return by_dtype(*call);
}
