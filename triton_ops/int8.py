"""MLPs and linear layers whose weights are int8 with a scale for each row (weight-only quantisation).

``y = (x rowsᵀ) * scale + bias``. The compiled backend reads one byte per weight, and of silent neurons the
gate alone. A scale of each output suits skipping: in the down projection ``[D, F]`` it is the same for all
neurons, and is applied to their sum.

Kernels run where nothing would be told of a call (:func:`int8_kernels`), and as ``torch.library`` operators
in graphs without gradient (:func:`int8_in_graph`). Elsewhere whoever holds such weights has a way of his own
to multiply with them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from triton_ops import choice, reference
from triton_ops.activations import check
from triton_ops.layout import is_neuron_major, view_of
from triton_ops.mlp import MLP, Int8Weight, Scales
from triton_ops.ops import (
    LIB,
    TAGS,
    check_input,
    check_tensor,
    check_vectors,
    in_inference_graph,
    native_or_default,
)
from triton_ops.protocol import Backend
from triton_ops.unobserved import unobserved

INT8_TOKENS = 32
"""Tokens up to which kernels are used, ``kMaxTokens`` of ``calls.h``; more are for who multiplies many."""

for _overload in ("", ".native"):
    for _linear in ("int8_linear", "int8_sparse_linear"):
        LIB.define(
            f"{_linear}{_overload}(Tensor x, Tensor rows, Tensor scale, Tensor? bias) -> Tensor", tags=TAGS
        )
    LIB.define(
        f"int8_mlp{_overload}(Tensor x, Tensor first, Tensor first_scale, Tensor? up, Tensor? up_scale, "
        "Tensor down, Tensor down_scale, Tensor? first_bias, Tensor? up_bias, Tensor? down_bias, "
        "Tensor? thresholds, str activation, float threshold) -> Tensor",
        tags=TAGS,
    )


def int8_kernels(x: Tensor, *biases: Tensor | None) -> Backend | None:
    """The backend whose kernels compute with ``x [..., F]``, of at most :data:`INT8_TOKENS` tokens.

    None with gradient, under autocast, in forward-mode differentiation, in a graph or where an observer would
    miss the call (:mod:`triton_ops.unobserved`); and where a backend without such kernels is forced.
    """
    if not unobserved(x, *biases) or torch.is_autocast_enabled("cpu") or forward_ad._current_level >= 0:
        return None
    return _backend(x.dtype) if _are_few(x) else None


def int8_in_graph(x: Tensor) -> bool:
    """Whether a graph that is being compiled should call these operators for ``x [..., F]``.

    Not with gradient or under autocast, for more tokens, on other devices, and in a program to be exported,
    which is to run without this package.
    """
    if not in_inference_graph() or choice.autocasts(x.device.type):
        return False
    if x.device.type != "cpu" or not _are_few(x):
        return False
    return choice.cpu_backend_in_graph("int8_mlp", x.dtype) is not None


def _in_graph(packet: Any, x: Tensor) -> Any:
    """The overload to call in a graph without gradient."""
    own = x.device.type == "cpu" and in_inference_graph()
    return native_or_default(packet, "int8_mlp", x.dtype) if own else packet.default


def _are_few(x: Tensor) -> bool:
    width = x.shape[-1] if x.ndim else 0
    return bool(width) and 0 < x.numel() // width <= INT8_TOKENS


def _backend(dtype: torch.dtype) -> Backend | None:
    """The one whose kernels run on the CPU for activations of ``dtype``."""
    return choice.backend_with("int8_mlp", dtype, choice.forced_backend())


def int8_obstacle(device: str, dtype: torch.dtype) -> str | None:
    """Why no kernel computes with such weights on this type of device, in this dtype; None if one does."""
    if device != "cpu":
        return f"its weights are int8, and kernels for them run on the CPU alone, not on {device}"
    if _backend(dtype) is None:
        return f"its weights are int8, and no backend has kernels for them here in {dtype}"
    return None


def int8_linear(x: Tensor, weight: Int8Weight, bias: Tensor | None = None) -> Tensor:
    """``(x rowsᵀ) * scale + bias``, dense.

    Args:
        x: ``[..., F]``, bfloat16, float16, float32 or float64.
        weight: rows int8 ``[D, F]``, scale float32 ``[D]``; it gets no gradient.
        bias: ``[D]``, dtype of ``x``, or None.

    Returns:
        ``[..., D]``, the dtype of ``x``, summed in float32 and rounded once. In bfloat16 the compiled backend
        rounds inputs to parts of 1/32767 of the largest of their token first, and multiplies integers, where
        that is less than half of an error of the result's own rounding.

    Raises:
        ValueError: an argument does not fit in shape, dtype or device; the message names it.
        MemoryError: the compiled backend has no memory for a copy of ``x``.

    """
    if torch.compiler.is_compiling() and not torch.is_grad_enabled():
        return _in_graph(torch.ops.hf_sparse.int8_linear, x)(x, *weight, bias)
    _check_linear("x", x, weight, bias)
    backend = int8_kernels(x, bias) if len(weight.rows) else None
    if backend is None or backend.int8_linear is None:
        return reference.int8_linear(x, weight, bias)
    return backend.int8_linear(x, weight, bias)


def int8_sparse_linear(h: Tensor, weight: Int8Weight, bias: Tensor | None = None) -> Tensor:
    """``(h rowsᵀ) * scale + bias``, reading only what neurons own where ``h`` is not exactly zero.

    Args:
        h: ``[..., F]``, as ``x`` of :func:`int8_linear`.
        weight: rows int8 ``[D, F]``, of the strides of :func:`triton_ops.neuron_major_`, or it runs dense.
        bias: ``[D]`` or None.

    Returns and raises:
        As :func:`int8_linear`.

    """
    if torch.compiler.is_compiling() and not torch.is_grad_enabled():
        return _in_graph(torch.ops.hf_sparse.int8_sparse_linear, h)(h, *weight, bias)
    _check_linear("h", h, weight, bias)
    skips = len(weight.rows) and is_neuron_major(weight.rows)
    backend = int8_kernels(h, bias) if skips else None
    if backend is None or backend.int8_sparse_linear is None:
        return reference.int8_linear(h, weight, bias)
    return backend.int8_sparse_linear(h, weight, bias)


def int8_mlp(
    x: Tensor,
    first: Int8Weight,
    up: Int8Weight | None,
    down: Int8Weight,
    first_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    *,
    activation: str,
    threshold: float | Tensor = 0.0,
) -> Tensor:
    """An MLP, gated or plain, without touching what silent neurons own of up and down projection.

    Args:
        x: ``[..., D]``, as of :func:`int8_linear`.
        first: the gate, or the up projection of a plain MLP: rows ``[F, D]``.
        up: rows ``[F, D]``; None in a plain MLP.
        down: rows ``[D, F]``; skipping needs the strides of :func:`triton_ops.neuron_major_`.
        first_bias: ``[F]`` or None.
        up_bias: ``[F]`` or None.
        down_bias: ``[D]`` or None.
        activation: a name in :data:`triton_ops.activations.TABLE`.
        threshold: its parameter, a number or ``[F]``.

    Returns:
        ``[..., D]``, the dtype of ``x``. Pre-activations and h are rounded to it, as in a dense computation.

    Raises:
        ValueError: an argument does not fit in shape, dtype, device or value; the message names it.
        MemoryError: the compiled backend has no memory for its intermediate values.

    """
    biases = first_bias, up_bias, down_bias
    if torch.compiler.is_compiling() and not torch.is_grad_enabled():
        scalar, each = (0.0, threshold) if isinstance(threshold, Tensor) else (threshold, None)
        weights = *first, *(up or (None, None)), *down
        call = _in_graph(torch.ops.hf_sparse.int8_mlp, x)
        return call(x, *weights, *biases, each, activation, scalar)
    mlp = _checked_mlp(x, first, up, down, *biases, activation, threshold)
    skips = len(first.rows) and is_neuron_major(down.rows)
    backend = int8_kernels(x, *biases) if skips else None
    if backend is None or backend.int8_mlp is None:
        return reference.int8_mlp(x, first, up, down, *biases, activation=activation, threshold=threshold)
    return backend.int8_mlp(x, mlp, _scales(first, up, down))


def _scales(first: Int8Weight, up: Int8Weight | None, down: Int8Weight) -> Scales:
    return first.scale, None if up is None else up.scale, down.scale


def _checked_mlp(
    x: Tensor,
    first: Int8Weight,
    up: Int8Weight | None,
    down: Int8Weight,
    first_bias: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    threshold: float | Tensor,
) -> MLP:
    check(activation, threshold, gated=up is not None)
    check_input("x", x, first.rows, "first")
    neurons, hidden = first.rows.shape
    _check_weight("first", first, (neurons, x.shape[-1]), x, "[F, D]")
    if up is not None:
        _check_weight("up", up, (neurons, hidden), x, "[F, D]")
    _check_weight("down", down, (hidden, neurons), x, "[D, F]")
    rows = first.rows, None if up is None else up.rows, down.rows
    mlp = MLP(*rows, first_bias, up_bias, down_bias, activation, threshold)
    check_vectors(x, mlp, "first")
    return mlp


def _of_op(x: Tensor, weight: Tensor) -> Backend | None:
    """Whose kernels an operator calls, which the dispatcher has come to, so that nobody watches any more."""
    return _backend(x.dtype) if weight.numel() and _are_few(x) else None


def _linear_op(x: Tensor, rows: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    weight = Int8Weight(rows, scale)
    _check_linear("x", x, weight, bias)
    backend = _of_op(x, rows)
    if backend is None or backend.int8_linear is None:
        return reference.int8_linear(x, weight, bias).contiguous()
    return backend.int8_linear(x, weight, bias)


def _sparse_linear_op(x: Tensor, rows: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    rows = view_of(rows)  # whose layout another thread may change
    weight = Int8Weight(rows, scale)
    _check_linear("h", x, weight, bias)
    backend = _of_op(x, rows) if is_neuron_major(rows) else None
    if backend is None or backend.int8_sparse_linear is None:
        return reference.int8_linear(x, weight, bias).contiguous()
    return backend.int8_sparse_linear(x, weight, bias)


def _mlp_of(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of :func:`_checked_mlp` after x, from those of the operator."""
    first, first_scale, up, up_scale, down, down_scale, *biases, thresholds, activation, threshold = args
    second, down = None if up is None else Int8Weight(up, up_scale), view_of(down)
    own = threshold if thresholds is None else thresholds
    return Int8Weight(first, first_scale), second, Int8Weight(down, down_scale), *biases, activation, own


def _mlp_op(x: Tensor, *args: Any) -> Tensor:
    given = _mlp_of(args)
    mlp, (first, up, down, *biases) = _checked_mlp(x, *given), given[:-2]
    backend = _of_op(x, mlp.first)
    if backend is not None and backend.int8_mlp is not None and is_neuron_major(mlp.down):
        return backend.int8_mlp(x, mlp, _scales(first, up, down))
    # A graph stays what it is when somebody has a weight back in its stock layout.
    product = reference.int8_linear if backend is None else backend.int8_linear
    assert product is not None
    kind: Any = {"activation": mlp.activation, "threshold": mlp.threshold, "product": product}
    return reference.int8_mlp(x, first, up, down, *biases, **kind).contiguous()


LIB.impl("int8_linear", _linear_op, "CPU")
LIB.impl("int8_sparse_linear", _sparse_linear_op, "CPU")
LIB.impl("int8_mlp", _mlp_op, "CPU")


@torch.library.register_fake("hf_sparse::int8_linear", lib=LIB)
@torch.library.register_fake("hf_sparse::int8_linear.native", lib=LIB)
@torch.library.register_fake("hf_sparse::int8_sparse_linear", lib=LIB)
@torch.library.register_fake("hf_sparse::int8_sparse_linear.native", lib=LIB)
def _(x: Tensor, rows: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    _check_linear("x", x, Int8Weight(rows, scale), bias)
    return x.new_empty((*x.shape[:-1], rows.shape[0]))


@torch.library.register_fake("hf_sparse::int8_mlp", lib=LIB)
@torch.library.register_fake("hf_sparse::int8_mlp.native", lib=LIB)
def _(x: Tensor, *args: Any) -> Tensor:
    _checked_mlp(x, *_mlp_of(args))
    return x.new_empty(x.shape)


def _check_linear(name: str, x: Tensor, weight: Int8Weight, bias: Tensor | None) -> None:
    check_input(name, x, weight.rows, "weight")
    outputs, _ = weight.rows.shape
    _check_weight("weight", weight, (outputs, x.shape[-1]), x, "[D, F]")
    check_tensor("bias", bias, (outputs,), x, "[D]")


def _check_weight(name: str, weight: Int8Weight, shape: tuple[int, int], x: Tensor, what: str) -> None:
    for part, value, size, dtype in (
        ("rows", weight.rows, shape, torch.int8),
        ("scale", weight.scale, shape[:1], torch.float32),
    ):
        if value.shape != size or value.dtype != dtype:
            raise ValueError(
                f"{name}.{part} is {value.dtype} of shape {list(value.shape)}; expected {dtype} of shape "
                f"{list(size)}, {part} of {what}."
            )
        if value.device != x.device:
            raise ValueError(
                f"{name}.{part} is on {value.device} and the input is on {x.device}; move one of them."
            )
