"""A mixture of experts as one operator: each token through the experts that it is routed to.

``torch.ops.hf_sparse.routed_mlp``. What depends on the routing stays inside of it. Each expert that is hit
runs as an MLP of its own on its tokens, as :func:`triton_ops.gated_mlp` or ``plain_mlp`` would.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from triton_ops import reference
from triton_ops.activations import check
from triton_ops.backends import AUTO
from triton_ops.mlp import MLP
from triton_ops.ops import LIB, TAGS, check_tensor, is_for_torch, run

LIB.define(
    "routed_mlp(Tensor x, Tensor experts, Tensor weights, Tensor first, Tensor? up, Tensor down, "
    "Tensor? first_bias, Tensor? up_bias, Tensor? down_bias, str activation, float threshold, str backend) "
    "-> Tensor",
    tags=TAGS,
)


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
    backend: str = AUTO,
) -> Tensor:
    """``sum over k of weights[:, k] * MLP of expert experts[:, k] (x)``, without what silent neurons own.

    Args:
        x: ``[T, D]``, bfloat16, float16, float32 or float64.
        experts: int64 ``[T, k]``; a number of E or more is no expert and adds nothing.
        weights: ``[T, k]``, floating.
        first: ``[E, F, D]``: the gates, or the up projections of plain experts; dtype and device of ``x``.
        up: ``[E, F, D]``; None of plain experts.
        down: ``[E, D, F]``; skipping needs the strides of :func:`neuron_major_`, without them it runs dense.
        first_bias: ``[E, F]`` or None.
        up_bias: ``[E, F]`` or None.
        down_bias: ``[E, D]`` or None.
        activation: a name in :data:`triton_ops.activations.TABLE`.
        threshold: its parameter, in the units of the table; 0 if it has none.
        backend: as of :func:`gated_mlp`, for each expert.

    Returns:
        ``[T, D]``, the dtype of ``x``, added up in float32 at least.

    Raises:
        ValueError: an argument does not fit in shape, dtype, device or value; the message names it.
        RuntimeError: the backend cannot run here.

    """
    mlp = MLP(first, up, down, first_bias, up_bias, down_bias, activation, threshold)
    tensors = x, experts, weights, first, up, down, first_bias, up_bias, down_bias
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if wanted or is_for_torch(x.device.type):
        _check(x, experts, weights, mlp)
        return reference.routed_mlp(*tensors, activation=activation, threshold=threshold)
    return torch.ops.hf_sparse.routed_mlp.default(*tensors, activation, threshold, backend)


def by_expert(experts: Tensor, count: int) -> Iterator[tuple[int, Tensor]]:
    """Each expert of ``experts [T, k]`` below ``count``, and its places in ``experts.flatten()``."""
    flat = experts.flatten()
    order = flat.argsort(stable=True)
    hit, counts = flat[order].unique_consecutive(return_counts=True)
    for expert, places in zip(hit.tolist(), order.split(counts.tolist()), strict=True):
        if 0 <= expert < count:
            yield expert, places


def _routed_mlp(x: Tensor, experts: Tensor, weights: Tensor, *args: Any) -> Tensor:
    *stacked, backend = args
    mlp = MLP(*stacked)
    _check(x, experts, weights, mlp)
    exact = torch.promote_types(x.dtype, torch.float32)
    out = torch.zeros(x.shape, dtype=exact, device=x.device)
    flat = weights.flatten().to(exact).unsqueeze(-1)
    for expert, places in by_expert(experts, len(mlp.down)):
        tokens = places // experts.shape[-1]
        own: Any = [part[expert] if isinstance(part, Tensor) else part for part in mlp]
        out.index_add_(0, tokens, run(x[tokens], MLP(*own), backend).to(exact) * flat[places])
    return out.to(x.dtype)


def _check(x: Tensor, experts: Tensor, weights: Tensor, mlp: MLP) -> None:
    """Shapes of the whole, ``mlp`` with stacked weights; each expert is checked as the MLP that it is."""
    gated = mlp.up is not None
    name = "gate" if gated else "up"
    check(mlp.activation, mlp.threshold, gated=gated)
    if x.ndim != 2 or mlp.first.ndim != 3:
        raise ValueError(
            f"x has shape {list(x.shape)} and {name} {list(mlp.first.shape)}; expected [T, D] and [E, F, D]."
        )
    count, neurons, hidden = mlp.first.shape
    if experts.dtype != torch.int64 or experts.ndim != 2 or len(experts) != len(x):
        raise ValueError(
            f"experts is {experts.dtype} {list(experts.shape)}; expected int64 [T, k] with T = {len(x)}."
        )
    if weights.shape != experts.shape or not weights.is_floating_point():
        raise ValueError(
            f"weights is {weights.dtype} {list(weights.shape)}; expected floating numbers, "
            f"{list(experts.shape)}."
        )
    check_tensor(name, mlp.first, (count, neurons, x.shape[-1]), x, "[E, F, D]")
    check_tensor("up", mlp.up, (count, neurons, hidden), x, "[E, F, D]")
    check_tensor("down", mlp.down, (count, hidden, neurons), x, "[E, D, F]")
    check_tensor(f"{name}_bias", mlp.first_bias, (count, neurons), x, "[E, F]")
    check_tensor("up_bias", mlp.up_bias if gated else None, (count, neurons), x, "[E, F]")
    check_tensor("down_bias", mlp.down_bias, (count, hidden), x, "[E, D]")


for _device in ("CPU", "CUDA"):
    LIB.impl("routed_mlp", _routed_mlp, _device)


@torch.library.register_fake("hf_sparse::routed_mlp", lib=LIB)
def _(x: Tensor, experts: Tensor, weights: Tensor, *args: Any) -> Tensor:
    _check(x, experts, weights, MLP(*args[:-1]))
    return x.new_empty(x.shape)
