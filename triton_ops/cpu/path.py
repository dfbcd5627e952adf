"""The compiled CPU path as a backend: tensors in, one call of ``mlp.cpp``, tensors out."""

from __future__ import annotations

import ctypes
import os
from functools import cache
from typing import Any

import torch
from torch import Tensor

from triton_ops.cpu import build
from triton_ops.mlp import MLP

DTYPES = {torch.float32: 0, torch.bfloat16: 1}
ACTIVATIONS = ("relu", "relu2", "jsrelu", "shifted_relu", "fatrelu", "drelu")  # in the order of mlp.cpp


# The threads of OpenMP do not survive a fork, and waiting for them hangs the child; it works on one instead.
_forked = False


def _after_fork() -> None:
    global _forked
    _forked = True


os.register_at_fork(after_in_child=_after_fork)


def unusable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this path cannot run on ``device`` with ``dtype``; None if it can. The first call builds it."""
    if device.type != "cpu":
        return f"it computes on the CPU and the tensors are on {device.type}"
    if dtype not in DTYPES:
        return f"it has no kernel for {dtype}; use {' or '.join(str(d) for d in DTYPES)}"
    library = build.library()
    return library if isinstance(library, str) else None


def mlp(x: Tensor, mlp: MLP) -> Tensor:
    """``x [T, D]`` to ``[T, D]``; ``mlp.down [D, F]`` neuron-major."""
    weights = (_rows(mlp.gate), None if mlp.up is None else _rows(mlp.up), mlp.down.t())
    biases = (mlp.gate_bias, mlp.up_bias, mlp.down_bias)
    return _mlp(x, weights, biases, ACTIVATIONS.index(mlp.activation), mlp.threshold)


def sparse_linear(h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``h [T, F]`` to ``[T, D]``; ``weight [D, F]`` neuron-major."""
    return _mlp(h, (None, None, weight.t()), (None, None, bias), 0, 0.0)


def _mlp(
    x: Tensor,
    weights: tuple[Tensor | None, Tensor | None, Tensor],
    biases: tuple[Tensor | None, Tensor | None, Tensor | None],
    kind: int,
    threshold: float,
) -> Tensor:
    gate, up, down = weights
    neurons, hidden = down.shape
    x = x.contiguous()
    held = [None if b is None else b.contiguous() for b in biases]
    y = x.new_empty(x.shape[0], hidden)
    call, max_tokens = _kernel()
    threads = 1 if _forked else torch.get_num_threads()
    for begin in range(0, x.shape[0], max_tokens):
        part, out = x[begin : begin + max_tokens], y[begin : begin + max_tokens]
        tokens = part.shape[0]
        scratch = torch.empty(_scratch(tokens, hidden, neurons), dtype=torch.float32)
        call(
            DTYPES[x.dtype],
            part.data_ptr(),
            _pointer(gate),
            _pointer(up),
            down.data_ptr(),
            *map(_pointer, held),
            out.data_ptr(),
            scratch.data_ptr(),
            tokens,
            hidden,
            neurons,
            0 if gate is None else gate.stride(0),
            0 if up is None else up.stride(0),
            down.stride(0),
            kind,
            threshold,
            threads,
        )
    return y


def _rows(weight: Tensor) -> Tensor:
    """``weight`` with contiguous rows, as the kernel needs them; an ``nn.Linear`` has them already."""
    return weight if weight.stride(1) == 1 else weight.contiguous()


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@cache
def _kernel() -> tuple[Any, int]:
    library = build.library()
    assert not isinstance(library, str), library  # unusable() has been asked
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    library.hfs_max_tokens.restype = size
    library.hfs_mlp.restype = None
    library.hfs_mlp.argtypes = [
        ctypes.c_int,
        *[pointer] * 9,
        *[size] * 6,
        ctypes.c_int,
        ctypes.c_float,
        ctypes.c_int,
    ]
    return library.hfs_mlp, library.hfs_max_tokens()


@cache
def _scratch(tokens: int, hidden: int, neurons: int) -> int:
    library = build.library()
    assert not isinstance(library, str), library
    library.hfs_scratch.argtypes = [ctypes.c_int64] * 3
    library.hfs_scratch.restype = ctypes.c_int64
    return library.hfs_scratch(tokens, hidden, neurons)
