"""The Triton backend, registered without Triton: that takes long to import, and some platforms have none."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch

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


def _later(module: str, name: str) -> Callable[..., Any]:
    """A function of a module beside this one, which a call imports."""

    def call(*args: Any) -> Any:
        return getattr(import_module(f"triton_ops.gpu.{module}"), name)(*args)

    return call


# No defaults: a cuBLAS product is hard to beat without a CUDA graph, so it is chosen only where a measurement
# says so.
BACKEND = Backend(
    name="triton",
    devices=("cuda",),
    dtypes=(torch.bfloat16, torch.float16, torch.float32),
    unusable=unusable,
    mlp=_later("operators", "mlp"),
    sparse_linear=_later("operators", "sparse_linear"),
    pairs=PairProducts(*[_later("sparse_products", name) for name in PairProducts._fields]),
    certifies=True,
)
