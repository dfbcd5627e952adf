// The CPU kernels behind a plain C interface, called through ctypes, so that one binary serves every version of torch.
//
// Shapes: T tokens, D hidden size, F neurons. The weights hold one neuron per contiguous row of D elements.

#include "fused.h"
#include "linear.h"
#include "scratch.h"

// One call. Weights and vectors lie in memory as their comments say; strides count elements between neurons.
struct Call {
  const void* x;  // [T, D], without a gate h [T, F], of which only the down projection is made
  const void *gate, *up, *down;                    // [F, D]; without an up projection h is the activated gate
  const void *gate_bias, *up_bias, *down_bias;     // [F], [F], [D], or null
  const void *q, *bounds;                          // [F, D] and [F, 3], or null; used for one token
  void* y;                                         // [T, D]
  int64_t T, D, F, gate_stride, up_stride, down_stride;
  int32_t dtype, kind, threads;                    // dtype: 0 float32, 1 bfloat16, 2 float16
  float threshold;
};
static_assert(sizeof(Call) == 16 * 8 + 4 * 4, "path.py packs it by hand");

namespace {

constexpr int64_t kManyTokens = 8;  // from here on the down projection may be a matrix product

// Splits T into equal parts of at most `most`, and calls run(first, count) for each.
template <class Run>
void in_parts(int64_t T, int64_t most, Run run) {
  const int64_t parts = (T + most - 1) / most;
  for (int64_t i = 0; i < parts; ++i) run(i * T / parts, (i + 1) * T / parts - i * T / parts);
}

// One part of a call: with scratch it runs, without it only counts the bytes that it needs.
template <class Job>
void run_part(Job job, int threads, char* scratch, int64_t& bytes) {
  const int64_t own = job.carve(scratch, threads);
  bytes = own > bytes ? own : bytes;
  if (scratch) job.run(threads);
}

// Down projection of h [T, F] for T >= kManyTokens: row by row if few pairs of token and neuron are active, else as a
// product.
template <class W>
void project(Fused<W> mlp, const typename W::Type* h, int threads, char* scratch, int64_t& bytes) {
  mlp.gate = mlp.up = nullptr;
  const double least = mlp.T <= kMaxTokens ? Step<W>::kDensity : Step<W>::kDensityOfMany;
  const bool silent = scratch && density<W>(h, mlp.T, mlp.F, threads) < least;
  if (silent || !scratch)
    in_parts(mlp.T, kMaxTokens, [&](int64_t first, int64_t n) {
      Fused<W> part = mlp;
      part.x = h + first * mlp.F, part.y = mlp.y + first * mlp.D, part.T = n;
      run_part(part, threads, scratch, bytes);
    });
  if (silent) return;
  in_parts(mlp.T, Linear<W>::kMaxT, [&](int64_t first, int64_t n) {
    Linear<W> linear = {};
    linear.h = h + first * mlp.F, linear.w = mlp.down, linear.bias = mlp.down_bias, linear.y = mlp.y + first * mlp.D;
    linear.T = n, linear.D = mlp.D, linear.F = mlp.F, linear.stride = mlp.down_stride;
    run_part(linear, threads, scratch, bytes);
  });
}

template <class W>
int64_t run(Fused<W> mlp, int threads, char* scratch) {
  int64_t bytes = 0;
  if (mlp.T < kManyTokens) {
    run_part(mlp, threads, scratch, bytes);
    return bytes;
  }
  Carver take{scratch};
  typename W::Type* hidden = nullptr;
  if (mlp.gate) take(hidden, mlp.T * mlp.F);
  const int64_t before = take.at - scratch;
  char* const rest = scratch ? take.at : nullptr;
  if (mlp.gate)
    in_parts(mlp.T, kMaxTokens, [&](int64_t first, int64_t n) {
      Fused<W> part = mlp;
      part.x += first * mlp.D, part.T = n, part.stores = true, part.hidden = hidden + first * mlp.F;
      run_part(part, threads, rest, bytes);
    });
  project(mlp, mlp.gate ? hidden : mlp.x, threads, rest, bytes);
  return before + bytes;
}

template <class W>
int run(const Call& call) {
  typedef typename W::Type Type;
  Fused<W> mlp = {};
  mlp.x = (const Type*)call.x, mlp.y = (Type*)call.y;
  mlp.gate = (const Type*)call.gate, mlp.up = (const Type*)call.up, mlp.down = (const Type*)call.down;
  mlp.gate_bias = (const Type*)call.gate_bias, mlp.up_bias = (const Type*)call.up_bias;
  mlp.down_bias = (const Type*)call.down_bias;
  if (call.T == 1) mlp.q = (const int8_t*)call.q, mlp.bounds = (const float*)call.bounds;
  mlp.T = call.T, mlp.D = call.D, mlp.F = call.F;
  mlp.gate_stride = call.gate_stride, mlp.up_stride = call.up_stride, mlp.down_stride = call.down_stride;
  mlp.kind = call.kind, mlp.threshold = rounded<W>(call.threshold);
  char* const scratch = take_scratch(size_t(run(mlp, call.threads, nullptr)));
  if (!scratch) return 1;
  run(mlp, call.threads, scratch);
  give_back_scratch(scratch);
  return 0;
}

}  // namespace

// Returns 0, or 1 where there is no memory for intermediate values; y is then as it was.
extern "C" int hfs_mlp(const Call* call) {
  return call->dtype == 0 ? run<Float32>(*call) : call->dtype == 1 ? run<BFloat16>(*call) : run<Float16>(*call);
}
