// What the kernels of a step are called with, by backend.py and by operators.cpp.
//
// Shapes: T tokens, D hidden size, F neurons. The weights hold one neuron per contiguous row of D elements.

#pragma once

#include <cstdint>

constexpr int64_t kMaxTokens = 32;     // that a block works on at once
constexpr int64_t kFewTokens = 8;      // that a dense product is made of at once: FEW of backend.py
constexpr int64_t kLinears = 4;        // dense products of the same tokens in one call, at most
constexpr int64_t kSharingHeads = 32;  // of queries with the same keys, at most: MOST of decode_attention.py
static_assert(kSharingHeads <= kMaxTokens, "they are worked on as tokens are");

// One call. Weights and vectors lie in memory as their comments say; strides count elements between neurons.
struct Call {
  const void* x;  // [T, D], without a gate h [T, F], of which only the down projection is made
  const void *gate, *up, *down;                    // [F, D]; without an up projection h is the activated gate
  const void *gate_bias, *up_bias, *down_bias;     // [F], [F], [D], or null
  const void* thresholds;                          // [F], or null: `threshold` for all
  const void *q, *bounds;                          // [F, D] and [F, 3], or null; used for one token
  const float *gate_scales, *up_scales, *down_scales;  // [F], [F], [D] of weights that are int8; else null
  void* y;                                         // [T, D]
  int64_t T, D, F, gate_stride, up_stride, down_stride;
  int32_t dtype, kind, threads;                    // dtype: 0 float32, 1 bfloat16, 2 float16
  float threshold;
};
static_assert(sizeof(Call) == 20 * 8 + 4 * 4, "backend.py packs it by hand");

// One dense product of a few tokens.
struct LinearCall {
  const void *x, *w, *bias;     // [T, F]; [D, F], of which rows or columns are contiguous; [D] or null
  const float* scales;          // [D] where w is int8, whose rows are then contiguous; else null
  const void *q, *bounds;       // [D, F] and [D, 3]: only what may be the largest output of a token; or null
  void* y;                      // [T, D]
  int64_t T, D, F, stride;      // between these rows or columns
  int32_t dtype, columns, threads, unused;
};
static_assert(sizeof(LinearCall) == 11 * 8 + 4 * 4, "backend.py packs it by hand");

// Some of the same x and dtype, of weights in rows, without scales and without a certificate.
struct LinearCalls {
  const LinearCall* calls;
  int64_t count;  // 1 to kLinears
  int32_t dtype;
};

// The attention of one new token of each sequence.
struct AttentionCall {
  const void *q, *k, *v;        // [B, H, D], [B, K, L, D], [B, K, L, V]; of all rows are contiguous
  const void *shown, *added;    // [B, L]: bool, and of the dtype; or null
  void* y;                      // [B, H, V]
  int64_t B, H, K, L, D, V;
  int64_t q_batch, q_head, k_batch, k_head, k_row, v_batch, v_head, v_row, mask_batch;
  int32_t dtype, threads;
  float scale;
  int32_t unused;
};
static_assert(sizeof(AttentionCall) == 21 * 8 + 4 * 4, "backend.py packs it by hand");
