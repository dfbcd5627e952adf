// The formula of each activation, under its name in triton_ops/activations.py. Scalar and vector code share it: V is
// float or Vec, t the parameter as the dtype W has it.
//
// silent: where a neuron is silent; false for NaN. value: elsewhere, rounded wherever torch rounds.
#pragma once

#include "smooth.h"
#include "vector.h"

#ifndef HFS_ACTIVATIONS
#error "build.py passes the names of the activations in the order of their codes: -DHFS_ACTIVATIONS=relu,relu2,…"
#endif

namespace {
namespace activations {

struct relu {
  static constexpr bool relu_up = false;  // whether the up projection goes through ReLU as well
  template <class W, class V> static auto silent(V p, V) { return p <= 0.0f; }
  template <class W, class V> static V value(V p, V) { return p; }
};

struct drelu : relu {
  static constexpr bool relu_up = true;
};

struct relu2 : relu {
  template <class W, class V> static V value(V p, V) { return rounded<W>(p * p); }
};

struct jsrelu : relu {
  template <class W, class V> static V value(V p, V) {
    return rounded<W>(p + rounded<W>(0.5f * rounded<W>(p * p)));
  }
};

struct jsrelu_linear : relu {
  template <class W, class V> static V value(V p, V t) {
    const V c = p > 4.0f ? V{} + 4.0f : p, d = rounded<W>(p - c);
    return rounded<W>(jsrelu::value<W>(c, t) + rounded<W>(4.0f * d + d));
  }
};

struct shifted_relu : relu {
  template <class W, class V> static auto silent(V p, V t) { return p <= t; }
  template <class W, class V> static V value(V p, V t) { return rounded<W>(p - t); }
};

struct fatrelu : relu {
  template <class W, class V> static auto silent(V p, V t) { return p < t; }
};

// CATS. What is silent is decided by the rounded value, as in the dense computation.
template <class Own>
struct cats : relu {
  template <class W, class V> static auto silent(V p, V t) { return smooth::magnitude(value<W>(p, t)) < t; }
  template <class W, class V> static V value(V p, V) { return rounded<W>(Own::at(p)); }
};

struct cats_silu : cats<smooth::silu> {};
struct cats_gelu : cats<smooth::gelu> {};
struct cats_gelu_tanh : cats<smooth::gelu_tanh> {};

// A name without a struct above does not compile, so the codes cannot mean anything else here than there.
template <class... Known>
struct Codes {
  // run(activation) for the one with this code.
  template <class Run>
  static void select(int code, Run run) {
    int place = 0;
    (void)((place++ == code && (run(Known{}), true)) || ...);
  }
};

typedef Codes<HFS_ACTIVATIONS> Table;

inline bool relu_up(int code) {
  bool up = false;
  Table::select(code, [&](auto activation) { up = activation.relu_up; });
  return up;
}

}  // namespace activations
}  // namespace
