"""The oracle: every operator of this package in plain PyTorch, to be read in one sitting.

The kernels are tested against these functions in float64. They make the torch calls of a stock Hugging Face
MLP, and the dense backend gives the same bits.

Shapes: T tokens (any number of leading dimensions), D hidden size, F neurons.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from triton_ops.activations import TABLE
from triton_ops.mlp import Int8Weight


def gated_mlp(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    *,
    activation: str,
    threshold: float | Tensor = 0.0,
) -> Tensor:
    """The gated MLP, ``down(act(gate(x)) * up(x))``, dense.

    Args:
        x: ``[..., D]``.
        gate: ``[F, D]``.
        up: ``[F, D]``.
        down: ``[D, F]``, of any strides.
        gate_bias: ``[F]`` or None.
        up_bias: ``[F]`` or None.
        down_bias: ``[D]`` or None.
        activation: a name in :data:`triton_ops.activations.TABLE`.
        threshold: its parameter, in the units of the table, a number or ``[F]``; 0 if it has none.

    Returns:
        ``[..., D]``.

    """
    p = F.linear(x, gate, gate_bias)
    return after_first(x, p, up, down, up_bias, down_bias, activation=activation, threshold=threshold)


def after_first(
    x: Tensor,
    p: Tensor,
    up: Tensor | None,
    down: Tensor,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    *,
    activation: str,
    threshold: float | Tensor = 0.0,
) -> Tensor:
    """The MLP after its first projection has given ``p [..., F]``; a plain one without ``up``."""
    row = TABLE[activation]
    h = row.value(p, threshold)
    if up is not None:
        u = F.linear(x, up, up_bias)
        h = h * (torch.relu(u) if row.relu_up else u)
    return sparse_linear(h, down, down_bias)


def plain_mlp(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    *,
    activation: str,
    threshold: float | Tensor = 0.0,
) -> Tensor:
    """The plain MLP, ``down(act(up(x)))``, dense; arguments as in :func:`gated_mlp`, without a gate."""
    p = F.linear(x, up, up_bias)
    return after_first(x, p, None, down, None, down_bias, activation=activation, threshold=threshold)


def sparse_linear(h: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``h weightᵀ + bias``: ``h [..., F]`` (kernels skip its exact zeros), ``weight [D, F]``."""
    return F.linear(h, weight, bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x weightᵀ + bias``: ``x [..., F]``, ``weight [D, F]``, of which every element counts."""
    return F.linear(x, weight, bias)


def int8_linear(x: Tensor, weight: Int8Weight, bias: Tensor | None = None) -> Tensor:
    """``(x rowsᵀ) * scale + bias`` with ``rows [D, F]`` in int8, rounded once to the dtype of ``x``."""
    wide = torch.promote_types(x.dtype, torch.float32)
    y = F.linear(x.to(wide), weight.rows.to(wide)) * weight.scale
    return (y if bias is None else y + bias).to(x.dtype)


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
    product: Callable[[Tensor, Int8Weight, Tensor | None], Tensor] = int8_linear,
) -> Tensor:
    """The MLP, dense; arguments as in :func:`gated_mlp`, or :func:`plain_mlp` without ``up``.

    ``product`` is another way to compute :func:`int8_linear`.
    """
    row = TABLE[activation]
    h = row.value(product(x, first, first_bias), threshold)
    if up is not None:
        u = product(x, up, up_bias)
        h = h * (torch.relu(u) if row.relu_up else u)
    return product(h, down, down_bias)


def routed_mlp(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    first: Tensor,
    up: Tensor | None,
    down: Tensor,
    first_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    *,
    activation: str,
    threshold: float = 0.0,
) -> Tensor:
    """A mixture of MLPs: ``x [T, D]``, ``experts`` and ``weights`` ``[T, k]``; of each weight ``[E, ...]``.

    An expert number of E or more adds nothing.
    """
    out = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
    for e in range(len(down)):
        tokens, slots = (experts == e).nonzero(as_tuple=True)
        b1, b2, b3 = (None if bias is None else bias[e] for bias in (first_bias, up_bias, down_bias))
        kind = {"activation": activation, "threshold": threshold}
        if up is None:
            y = plain_mlp(x[tokens], first[e], down[e], b1, b3, **kind)  # type: ignore[arg-type]
        else:
            y = gated_mlp(x[tokens], first[e], up[e], down[e], b1, b2, b3, **kind)  # type: ignore[arg-type]
        out = out.index_add(0, tokens, (y * weights[tokens, slots, None]).to(out.dtype))
    return out.to(x.dtype)
