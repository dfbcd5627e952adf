// Attention of one new token of each sequence: y [B, H, V] = softmax(scale q kᵀ + mask) v, over L tokens, in dtype W.
//
// Most of a static cache is not written yet, and of a padded prompt the first tokens are not seen: tokens before the
// first and after the last that `shown` shows are not read.
//
// Query heads that share keys are computed together, so that each key and value is read, and widened, once. Scores,
// weights and sums are float32, rounded once. A piece of work is a sequence and a head of keys; the bits do not depend
// on threads.
#pragma once

#include "dots.h"
#include "smooth.h"
#include "team.h"

namespace {

template <class W>
struct Attention {
  typedef typename W::Type Type;
  typedef typename Product<W>::In In;
  static constexpr int64_t kShared = kSharingHeads;  // query heads of a head of keys, at most
  static constexpr int64_t kBlock = 64;           // keys whose products are kept before they are scores
  static constexpr int64_t kTogether = 4;         // heads whose sums are in registers at once
  static constexpr int64_t kAlone = 128 * 1024;   // bytes of keys and values that one thread reads sooner
  const Type *q, *k, *v;       // [B, H, D], [B, K, L, D], [B, K, L, V]; rows are contiguous
  const uint8_t* shown;        // [B, L], 0 where a token is not seen; or null
  const Type* added;           // [B, L], added to the scores; or null
  Type* y;                     // [B, H, V]
  int64_t B, H, K, L, D, V;
  int64_t q_batch, q_head, k_batch, k_head, k_row, v_batch, v_head, v_row, mask_batch;  // strides
  float scale;
  // Set by carve().
  In* inputs;      // [B, H, padded(D)]
  float* weights;  // [B, H, padded(L)]

  // Those of the L tokens of a sequence that are read.
  struct Window {
    int64_t begin, count;
  };

  Window window(int64_t b) const {
    if (!shown) return {0, L};
    const uint8_t* const own = shown + b * mask_batch;
    int64_t begin = 0, end = L;
    while (end && !own[end - 1]) --end;
    while (begin < end && !own[begin]) ++begin;
    return {begin, end - begin};
  }

  // products [n, G] of the tokens from `first` of the window on: their scores.
  void set_scores(const float* products, int64_t b, Window at, int64_t first, int64_t n, int64_t G,
                  float* const* scores) const {
    for (int64_t j = first; j < first + n; ++j) {
      const int64_t l = b * mask_batch + at.begin + j;
      const bool hidden = shown && !shown[l];
      const float more = added ? W::widen(added[l]) : 0.0f;
      for (int64_t g = 0; g < G; ++g)
        scores[g][j] = hidden ? -__builtin_inff() : products[(j - first) * G + g] * scale + more;
    }
  }

  // n scores to e^(score - largest), with zeros up to padded(n); the sum of them.
  static float exponentials(float* scores, int64_t n) {
    const int64_t end = padded(n);
    float most = -__builtin_inff();
    for (int64_t l = 0; l < n; ++l) most = scores[l] > most ? scores[l] : most;
    if (most == -__builtin_inff()) most = 0.0f;  // nothing is seen, or all is NaN
    for (int64_t l = n; l < end; ++l) scores[l] = -__builtin_inff();
    Vec total = {};
    for (int64_t l = 0; l < end; l += kLanes) {
      const Vec e = smooth::exp(Float32::lanes(scores + l) - most);
      *reinterpret_cast<VecLoose*>(scores + l) = e;
      total += e;
    }
    return sum(total);
  }

  // Columns c … c + kStep of the sums over `tokens`, for n <= kTogether heads.
  void add_values(const Type* values, int64_t tokens, int64_t c, float* const* e, const float* factors, Type* const* out,
                  int64_t n) const {
    Vec sums[2 * kTogether] = {};
    for (int64_t l = 0; l < tokens; ++l) {
      Vec a, b;
      W::load(values + l * v_row + c, a, b);
      for (int64_t g = 0; g < n; ++g) sums[2 * g] += e[g][l] * a, sums[2 * g + 1] += e[g][l] * b;
    }
    for (int64_t g = 0; g < n; ++g) W::store(out[g] + c, sums[2 * g] * factors[g], sums[2 * g + 1] * factors[g]);
  }

  void run_head(int64_t b, int64_t head) const {
    const int64_t G = H / K, first_head = b * H + head * G;
    const Window seen = window(b);
    const In* input[kShared];
    int32_t column[kShared];
    float *scores[kShared], factors[kShared];
    Type* out[kShared];
    for (int64_t g = 0; g < G; ++g) {
      In* const own = inputs + (first_head + g) * padded(D);
      Product<W>::template prepare<W>(q + b * q_batch + (head * G + g) * q_head, own, D);
      input[g] = own, column[g] = int32_t(g);
      scores[g] = weights + (first_head + g) * padded(L);
      out[g] = y + (first_head + g) * V;
    }
    const Type* const keys = k + b * k_batch + head * k_head + seen.begin * k_row;
    const Type* rows[kBlock + kAhead];
    float products[kBlock * kShared];
    for (int64_t first = 0, n; first < seen.count; first += n) {
      n = std::min(kBlock, seen.count - first);
      for (int64_t j = 0; j < n + kAhead; ++j) rows[j] = keys + std::min(first + j, seen.count - 1) * k_row;
      all_dots<W>(rows, n, input, column, G, D, products, G, true);
      set_scores(products, b, seen, first, n, G, scores);
    }
    for (int64_t g = 0; g < G; ++g) {
      const float total = exponentials(scores[g], seen.count);
      factors[g] = total == 0.0f ? 0.0f : 1.0f / total;
    }
    const Type* const values = v + b * v_batch + head * v_head + seen.begin * v_row;
    const int64_t whole = V / kStep * kStep;
    for (int64_t c = 0; c < whole; c += kStep)
      for (int64_t g = 0; g < G; g += kTogether)
        add_values(values, seen.count, c, scores + g, factors + g, out + g, std::min(kTogether, G - g));
    for (int64_t c = whole; c < V; ++c)
      for (int64_t g = 0; g < G; ++g) {
        float total = 0.0f;
        for (int64_t l = 0; l < seen.count; ++l) total += scores[g][l] * W::widen(values[l * v_row + c]);
        out[g][c] = W::narrow(total * factors[g]);
      }
  }

  void run(int threads) {
    const int64_t count = B * K;
    int64_t tokens = 0;
    for (int64_t b = 0; b < B; ++b) tokens += window(b).count;
    if (tokens * K * (D + V) * int64_t(sizeof(Type)) <= kAlone) threads = 1;
    Pieces pieces(count);
    together(int(std::min(count, int64_t(threads))), [&](Worker&) {
      pieces.share([&](int64_t i) { run_head(i / K, i % K); });
    });
  }

  // Gives out the scratch memory; returns its size in bytes. With null it only counts.
  int64_t carve(char* scratch, int) {
    Carver take{scratch};
    take(inputs, B * H * padded(D));
    take(weights, B * H * padded(L));
    return take.at - scratch;
  }
};

}  // namespace
