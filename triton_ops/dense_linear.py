"""The dense product of a few tokens with the weight of an ``nn.Linear``, at the speed of memory.

``torch.ops.hf_sparse.linear``. Nothing is skipped: it is ``F.linear``, which reads weights at a fraction of
that speed when it multiplies them by one token. Wherever ``F.linear`` does more than multiply (gradients,
autocast, tensor subclasses), :func:`linear` calls it.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from triton_ops import choice, reference
from triton_ops.advice import adviser
from triton_ops.backends import AUTO, DENSE, REGISTRY
from triton_ops.gradients import linear_backward, save_linear
from triton_ops.layout import view_of
from triton_ops.memo import remembered
from triton_ops.ops import (
    LIB,
    TAGS,
    check_input,
    check_tensor,
    define,
    dispatched,
    is_for_torch,
)
from triton_ops.problem import Problem
from triton_ops.protocol import Backend
from triton_ops.unobserved import unobserved

_MANY = 1 << 62  # tokens


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str = AUTO) -> Tensor:
    """``x weightᵀ + bias``, all of it: NaN and infinity come through as in ``F.linear``, also times 0.

    A backend with a kernel for it (``"cpp"``) reads the weight once for up to 8 tokens. More tokens are
    ``F.linear``, but in a dtype that this CPU has no arithmetic for, as AVX2 has none for bfloat16: there
    they are products of 8. Backends without a kernel are ``F.linear``, and so are calls with gradient, under
    autocast, in forward-mode differentiation, and with tensor subclasses.

    Args:
        x: ``[..., F]``, bfloat16, float16, float32 or float64, of any strides.
        weight: ``[D, F]``, same dtype and device, of which rows (as ``nn.Linear`` stores it) or columns (as
            :func:`neuron_major_` does) are contiguous; one of other strides is left to ``F.linear``.
        bias: ``[D]`` or None.
        backend: what :meth:`triton_ops.Plan.backend` of the form ``"dense_linear"`` has answered, and is
            done. ``"auto"`` asks when the operator runs.

    Returns:
        ``[..., D]``, the dtype of ``x``, contiguous, summed in float32 and rounded once. On the CPU the bits
        of a token by the kernel depend neither on the other tokens of a call nor on the number of threads.

    Raises:
        ValueError: an argument does not fit in shape, dtype, device or value; the message names it.
        RuntimeError: the backend cannot run here.
        MemoryError: the compiled backend has no memory for a copy of ``x``.

    """
    if is_for_torch(x.device.type):
        return reference.linear(x, weight, bias)
    tensors = x, weight, bias
    if unobserved(*tensors):
        return _linear(*tensors, backend)
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if wanted or not all(t is None or type(t) in (Tensor, nn.Parameter) for t in tensors):
        return reference.linear(*tensors)
    return dispatched(torch.ops.hf_sparse.linear, x, backend)(*tensors, backend)


def quick(x: Tensor, weight: Tensor, bias: Tensor | None) -> Backend | None:
    """Whose product :func:`linear` takes for CPU tensors that fit together; None where torch is to be called.

    It asks what has to be asked of every call, and no more: a small product takes no longer than this.
    """
    if not unobserved(x, weight, bias) or torch.is_autocast_enabled("cpu") or forward_ad._current_level >= 0:
        return None
    dtype, shape, inputs = weight.dtype, weight.shape, x.shape[-1] if x.ndim else 0
    if x.dtype is not dtype or len(shape) != 2 or inputs != shape[1] or x.requires_grad:
        return None
    counts, backend = _few(shape, dtype, choice.forced_backend())
    tokens = x.numel() // inputs if inputs else 0
    if tokens not in counts or (bias is not None and (bias.dtype is not dtype or bias.shape != shape[:1])):
        return None
    return backend


@remembered
def _few(shape: tuple[int, int], dtype: torch.dtype, forced: str) -> tuple[Container[int], Backend | None]:
    """Which numbers of tokens a backend multiplies with a weight ``[D, F]`` on the CPU, and that backend."""
    plan = choice.plan_of(Problem("dense_linear", *shape, dtype, "cpu"), forced)
    found = REGISTRY.get(plan.skipping)
    # Also where it is forced: a product in another dtype is nothing that a user of it asks for.
    if found is None or found.linear is None or 0 in shape or found.obstacle("cpu", dtype):
        return (), None
    last = plan.steps[-1][0] if plan.steps else 0
    counts = frozenset(n for n in range(1, last + 1) if plan.backend(n) == found.name)
    if len(counts) == last and plan.backend(_MANY) == found.name:
        return range(1, _MANY), found
    return counts, found


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_input("x", x, weight, "weight")
    outputs, _ = weight.shape
    check_tensor("weight", weight, (outputs, x.shape[-1]), x, "[D, F]")
    check_tensor("bias", bias, (outputs,), x, "[D]")


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    _check(x, weight, bias)
    weight = view_of(weight)  # as of the other operators
    if (one := adviser()) is not None and (advised := one.product(x, weight)) is not None:
        return advised
    outputs, inputs = weight.shape
    tokens = x.numel() // inputs if inputs else 0
    if backend == AUTO:
        backend = choice.plan(weight, "dense_linear").backend(tokens)
    chosen = None if backend == DENSE else choice.runnable(backend, x.device.type, x.dtype)
    if chosen is None or chosen.linear is None or not (tokens and outputs):
        return reference.linear(x, weight, bias).contiguous()
    return chosen.linear(x, weight, bias)


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    _check(x, weight, bias)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _vmap(info: Any, dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
    *tensors, backend = args
    call = torch.ops.hf_sparse.linear.default
    if dims[1] is None and dims[2] is None:  # one weight for all: they are tokens of one call
        return call(tensors[0].movedim(dims[0], 0), *tensors[1:], backend), 0

    def each(i: int) -> list[Tensor | None]:
        return [t if d is None else t.select(d, i) for t, d in zip(tensors, dims, strict=False)]

    return torch.stack([call(*each(i), backend) for i in range(info.batch_size)]), 0


define("linear", "Tensor x, Tensor weight, Tensor? bias, str backend", _linear, _fake)
torch.library.register_autograd("hf_sparse::linear", linear_backward, setup_context=save_linear, lib=LIB)
for _overload in ("linear", "linear.inference", "linear.native"):
    torch.library.register_vmap(f"hf_sparse::{_overload}", _vmap, lib=LIB)


def _fakes(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], backend: str
) -> list[Tensor]:
    return [_fake(x, weight, bias, backend) for weight, bias in zip(weights, biases, strict=True)]


# Some products of the same x, for graphs on the CPU alone (joined_linears.py).
LIB.define("linears.native(Tensor x, Tensor[] weights, Tensor?[] biases, str backend) -> Tensor[]", tags=TAGS)
torch.library.register_fake("hf_sparse::linears.native", _fakes, lib=LIB)
