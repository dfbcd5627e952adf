"""What the Triton kernels compute per neuron: bias, rounding, activation test, activation value.

Values are float32; they are rounded to the dtype of the model wherever the dense computation rounds, so that
both select the same neurons. The functions work on tiles of any shape.
"""

# The parameters of a kernel are pointers, scalars and constexprs of Triton's own.
# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from triton_ops.activations import TABLE

# A kernel can read a code only from a global of its own.
RELU = tl.constexpr(TABLE["relu"].code)
RELU2 = tl.constexpr(TABLE["relu2"].code)
SHIFTED_RELU = tl.constexpr(TABLE["shifted_relu"].code)
FATRELU = tl.constexpr(TABLE["fatrelu"].code)
DRELU = tl.constexpr(TABLE["drelu"].code)
JSRELU = tl.constexpr(TABLE["jsrelu"].code)
JSRELU_LINEAR = tl.constexpr(TABLE["jsrelu_linear"].code)
CATS_SILU = tl.constexpr(TABLE["cats_silu"].code)
CATS_GELU = tl.constexpr(TABLE["cats_gelu"].code)
CATS_GELU_TANH = tl.constexpr(TABLE["cats_gelu_tanh"].code)


@triton.jit
def round_to(v, dtype: tl.constexpr):
    """Float32 to the nearest value of ``dtype``, as float32."""
    # Spelt out for bfloat16, because Triton's interpreter truncates.
    if dtype == tl.bfloat16:
        bits = v.to(tl.int32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        return tl.where(v != v, v, nearest.to(tl.float32, bitcast=True))
    else:  # noqa: RET505 (a constexpr branch must stay one)
        return v.to(dtype).to(tl.float32)


@triton.jit
def add_bias(v, bias_ptr, f, mask, BIAS: tl.constexpr, dtype: tl.constexpr):
    """The output of a linear layer from its dot products v; monotone in v, as the certificate needs it."""
    if BIAS:
        v += tl.load(bias_ptr + f, mask=mask, other=0.0).to(tl.float32)
    return round_to(v, dtype)


@triton.jit
def load_threshold(threshold, thresholds_ptr, f, mask, EACH: tl.constexpr, dtype: tl.constexpr):
    """The parameter of the neurons f, in the model's dtype: EACH has its own, or all have one."""
    if EACH:
        return tl.load(thresholds_ptr + f, mask=mask, other=0.0).to(tl.float32)
    else:  # noqa: RET505 (a constexpr branch must stay one)
        return round_to(tl.full([], threshold, tl.float32), dtype)


@triton.jit
def activate(p, t, KIND: tl.constexpr, dtype: tl.constexpr):
    """The activation of p, with the parameter t, where it is not silent."""
    if KIND == RELU2:
        a = p * p
    elif KIND == JSRELU:
        a = p + 0.5 * round_to(p * p, dtype)
    elif KIND == JSRELU_LINEAR:
        c = tl.where(p > 4.0, 4.0, p)
        d = round_to(p - c, dtype)
        a = round_to(c + 0.5 * round_to(c * c, dtype), dtype) + round_to(4.0 * d + d, dtype)
    elif KIND == SHIFTED_RELU:
        a = p - t
    elif KIND == CATS_SILU:
        a = p / (1.0 + tl.exp(-p))
    elif KIND == CATS_GELU:
        a = p * (0.5 + 0.5 * tl.erf(0.70710678118 * p))
    elif KIND == CATS_GELU_TANH:
        # p (1 + tanh u) / 2 with u = sqrt(2 / pi) (p + 0.044715 p**3)
        a = p / (1.0 + tl.exp(-1.59576912160 * (p + 0.044715 * p * p * p)))
    else:
        known: tl.constexpr = (KIND == RELU) | (KIND == DRELU) | (KIND == FATRELU)
        tl.static_assert(known, "this activation has no formula in triton_ops/gpu/numerics.py")
        a = p
    return round_to(a, dtype)


@triton.jit
def is_silent(p, t, KIND: tl.constexpr, dtype: tl.constexpr):
    """Whether a neuron with the parameter t is silent; not if p is NaN."""
    if KIND == FATRELU:
        return p < t
    elif KIND == SHIFTED_RELU:  # noqa: RET505
        return p <= t
    elif (KIND == CATS_SILU) | (KIND == CATS_GELU) | (KIND == CATS_GELU_TANH):
        return tl.abs(activate(p, t, KIND, dtype)) < t
    else:
        return p <= 0.0
