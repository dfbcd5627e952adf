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
from triton_ops.reference import ACTIVATIONS

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

MAX_SIZES = 256
_scratch_bytes: dict[tuple[object, ...], int] = {}
"""What the kernel needs, by all that it depends on: decoding asks for the same sizes at every call."""

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
    return _call(x, mlp, ACTIVATIONS.index(mlp.activation))


def sparse_linear(h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``h [T, F]`` to ``[T, D]``; ``weight [D, F]`` neuron-major."""
    return _call(h, MLP(None, None, weight, None, None, bias, "", 0.0), 0)  # type: ignore[arg-type]


def _call(x: Tensor, mlp: MLP, kind: int) -> Tensor:
    x, down = x.contiguous(), mlp.down.t()
    gate, up = (None if w is None else _rows(w) for w in (mlp.gate, mlp.up))
    biases = [None if b is None else b.contiguous() for b in (mlp.gate_bias, mlp.up_bias, mlp.down_bias)]
    certificate = (
        [c.contiguous() for c in mlp.certificate] if mlp.certificate and x.shape[0] == 1 else (None, None)
    )
    neurons, hidden = down.shape
    y = x.new_empty(x.shape[0], hidden)
    threads = 1 if _forked else torch.get_num_threads()

    def run(scratch: int | None) -> int:
        return _kernel()(
            DTYPES[x.dtype],
            x.data_ptr(),
            *map(_pointer, (gate, up, down, *biases, *certificate)),
            y.data_ptr(),
            scratch,
            x.shape[0],
            hidden,
            neurons,
            *(0 if w is None else w.stride(0) for w in (gate, up, down)),
            kind,
            mlp.threshold,
            threads,
        )

    sizes = (x.dtype, x.shape[0], hidden, neurons, gate is None, certificate[0] is None, threads)
    if sizes not in _scratch_bytes:
        if len(_scratch_bytes) >= MAX_SIZES:  # prompts come in any length
            _scratch_bytes.clear()
        _scratch_bytes[sizes] = run(None)
    scratch = torch.empty(_scratch_bytes[sizes], dtype=torch.uint8)
    run(scratch.data_ptr())
    return y


def _rows(weight: Tensor) -> Tensor:
    """``weight`` with contiguous rows, as the kernel needs them; an ``nn.Linear`` has them already."""
    return weight if weight.stride(1) == 1 else weight.contiguous()


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@cache
def _kernel() -> Any:
    library = build.library()
    assert not isinstance(library, str), library  # unusable() has been asked
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    library.hfs_mlp.restype = size
    library.hfs_mlp.argtypes = [
        ctypes.c_int,
        *[pointer] * 11,
        *[size] * 6,
        ctypes.c_int,
        ctypes.c_float,
        ctypes.c_int,
    ]
    return library.hfs_mlp
