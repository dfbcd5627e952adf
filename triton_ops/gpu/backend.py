"""The Triton backend, registered without Triton: that takes long to import, and some platforms have none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from triton_ops.mlp import MLP
from triton_ops.pairs import PairProducts
from triton_ops.protocol import Backend


def unusable(device: str) -> str | None:
    """Why it cannot run on this type of device; None if it can."""
    try:
        from triton_ops.gpu.down import interpreted
    except ImportError as error:
        return f"{error}; pip install triton"
    if device == "cpu" and not interpreted():
        return (
            "Triton compiles for GPUs and the tensors are on the CPU "
            "(TRITON_INTERPRET=1, set before Python starts, runs the kernels in its interpreter)"
        )
    return None if device in ("cpu", "cuda") else f"it has not been written for {device} devices"


def mlp(x: Tensor, mlp: MLP) -> Tensor:
    """:func:`triton_ops.gpu.operators.mlp`."""
    from triton_ops.gpu import operators

    return operators.mlp(x, mlp)


def sparse_linear(h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """:func:`triton_ops.gpu.operators.sparse_linear`."""
    from triton_ops.gpu import operators

    return operators.sparse_linear(h, weight, bias)


def _later(name: str) -> Callable[..., Any]:
    """A function of :mod:`triton_ops.gpu.sparse_products`."""

    def call(*args: Any) -> Any:
        from triton_ops.gpu import sparse_products

        return getattr(sparse_products, name)(*args)

    return call


# No defaults: a cuBLAS product is hard to beat without a CUDA graph, so it is chosen only where a measurement
# says so.
BACKEND = Backend(
    name="triton",
    devices=("cuda",),
    dtypes=(torch.bfloat16, torch.float16, torch.float32),
    unusable=unusable,
    mlp=mlp,
    sparse_linear=sparse_linear,
    pairs=PairProducts(*map(_later, PairProducts._fields)),
    certifies=True,
)
