// The CPU kernels behind a plain C interface, called through ctypes, so that one binary serves every version of torch.
//
// Shapes: T tokens, D hidden size, F neurons. The weights hold one neuron per contiguous row of D elements.

#include "fused.h"
#include "linear.h"

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

}  // namespace

extern "C" {

// y [T, D] from x [T, D]; with gate == nullptr, x is h [T, F] and only the down projection is done; with up ==
// nullptr, h is the activated gate. q [F, D] and bounds [F, 3] may be null; with them T must be 1.
// dtype: 0 float32, 1 bfloat16, 2 float16. Strides count elements between neurons.
// Returns the bytes that scratch must hold; with scratch == nullptr it does nothing else.
int64_t hfs_mlp(int dtype, const void* x, const void* gate, const void* up, const void* down, const void* gate_bias,
                const void* up_bias, const void* down_bias, const void* q, const void* bounds, void* y,
                void* scratch, int64_t T, int64_t D, int64_t F, int64_t gate_stride, int64_t up_stride,
                int64_t down_stride, int kind, float threshold, int threads) {
  auto call = [&](auto w) {
    typedef decltype(w) W;
    typedef typename W::Type Type;
    Fused<W> mlp = {};
    mlp.x = (const Type*)x, mlp.gate = (const Type*)gate, mlp.up = (const Type*)up, mlp.down = (const Type*)down;
    mlp.gate_bias = (const Type*)gate_bias, mlp.up_bias = (const Type*)up_bias;
    mlp.down_bias = (const Type*)down_bias, mlp.q = (const int8_t*)q, mlp.bounds = (const float*)bounds;
    mlp.y = (Type*)y, mlp.T = T, mlp.D = D, mlp.F = F;
    mlp.gate_stride = gate_stride, mlp.up_stride = up_stride, mlp.down_stride = down_stride;
    mlp.kind = kind, mlp.threshold = rounded<W>(threshold);
    return run(mlp, threads, (char*)scratch);
  };
  return dtype == 0 ? call(Float32{}) : dtype == 1 ? call(BFloat16{}) : call(Float16{});
}
}
