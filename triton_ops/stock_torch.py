"""Skipping silent neurons with stock PyTorch operators, for one token: the path that needs no compiler.

The gate is a dense product; the up rows of active neurons are gathered and multiplied; the down projection is
``F.embedding_bag`` on the neuron-major weight, which reads only the active rows and accumulates in float32
(``h @ down[idx]`` is many times slower in bfloat16).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from triton_ops.activations import TABLE
from triton_ops.layout import as_tokens
from triton_ops.mlp import MLP
from triton_ops.protocol import Backend, Default

MAX_DENSITY = {torch.bfloat16: 0.4, torch.float16: 0.25, torch.float32: 0.25}
"""Share of active neurons above which gathering their up rows costs more than reading all of them."""


def unusable(device: str) -> str | None:
    """Why it cannot run on this type of device; None if it can."""
    if device == "cpu":
        return None
    return f"it counts active neurons on the host, which would stall a {device} device"


def mlp(x: Tensor, mlp: MLP) -> Tensor:
    """``x [..., D]`` to ``[..., D]``; above ``MAX_DENSITY`` a token's up rows are all read."""
    row = TABLE[mlp.activation]
    a = row.value(F.linear(x, mlp.first, mlp.first_bias), mlp.threshold)
    rows = []
    for token, active in zip(as_tokens(x), as_tokens(a), strict=True):
        idx = active.nonzero().squeeze(1)
        h = active.index_select(0, idx)
        if mlp.up is not None:
            u = _up(token, mlp.up, mlp.up_bias, idx)
            h = h * (torch.relu(u) if row.relu_up else u)
        rows.append(_down(h, idx, mlp.down, mlp.down_bias))
    return torch.stack(rows).view(x.shape)


def _up(x: Tensor, up: Tensor, bias: Tensor | None, idx: Tensor) -> Tensor:
    """The up projection of the neurons ``idx`` for one token ``[D]``."""
    if idx.shape[0] > MAX_DENSITY[x.dtype] * up.shape[0]:
        return F.linear(x, up, bias).index_select(0, idx)
    return F.linear(x, up.index_select(0, idx), None if bias is None else bias.index_select(0, idx))


def sparse_linear(h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``h [..., F]``, ``weight [D, F]`` to ``[..., D]``."""
    rows = []
    for active in as_tokens(h):
        idx = active.nonzero().squeeze(1)
        rows.append(_down(active.index_select(0, idx), idx, weight, bias))
    return torch.stack(rows).view(*h.shape[:-1], weight.shape[0])


def _down(h: Tensor, idx: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The rows ``idx`` of the neuron-major ``weight``, weighted by ``h`` and summed: ``[D]``."""
    # Several bags, because threads share bags and long sums lose digits; few where a bag's sum is rounded.
    neurons = idx.shape[0]
    size = max(256, 1 if h.dtype == torch.float32 else -(-neurons // 4))
    # Zero neurons make an empty bag, whose sum is zero, as it should be.
    bags = torch.arange(0, max(neurons, 1), size)
    y = F.embedding_bag(idx, weight.t(), bags, mode="sum", per_sample_weights=h).sum(0)
    return y if bias is None else y + bias


BACKEND = Backend(
    name="torch",
    devices=("cpu",),
    dtypes=tuple(MAX_DENSITY),
    unusable=unusable,
    mlp=mlp,
    sparse_linear=sparse_linear,
    defaults={
        torch.bfloat16: Default(min_bytes=16 << 20, few=1),
        torch.float32: Default(min_bytes=16 << 20, few=1),
    },
)
