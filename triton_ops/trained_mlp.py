"""An MLP in training, where most neurons are silent: after the deciding projection only active pairs count.

Of the six products of a plain MLP in a step (nine of a gated one) one is dense; the others need a pair of a
token and a neuron only if the neuron is active for the token (Peng et al., arXiv 2309.03004). What is kept
for the backward pass shrinks likewise.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from triton_ops import choice, reference
from triton_ops.activations import TABLE, check
from triton_ops.backends import AUTO
from triton_ops.layout import as_tokens
from triton_ops.pairs import PairProducts, Pairs


def trained_mlp(
    x: Tensor,
    first: Tensor,
    up: Tensor | None,
    down: Tensor,
    first_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    *,
    activation: str,
    threshold: float | Tensor = 0.0,
    max_density: float = 0.1,
) -> Tensor:
    """:func:`triton_ops.gated_mlp`, or :func:`triton_ops.plain_mlp` without ``up``, to be trained.

    After the first projection it counts the active pairs of a token and a neuron. Few of them are all that is
    computed and kept from there on, in the backward pass as well; else, and where there is no kernel, it is
    the dense formula. Both give the same numbers to rounding, and which it is depends on values alone.

    Args:
        x: ``[..., D]``. Under autocast all that follows is in its dtype.
        first: ``[F, D]``, the gate of a gated MLP, else the up projection; same dtype and device as ``x``.
        up: ``[F, D]``, or None.
        down: ``[D, F]``, of any strides, as those before.
        first_bias: ``[F]`` or None.
        up_bias: ``[F]`` or None.
        down_bias: ``[D]`` or None.
        activation: a name in :data:`triton_ops.activations.TABLE`.
        threshold: its parameter, a number, or ``[F]``, which gets no gradient.
        max_density: the share of pairs, 0 to 1, up to which skipping is worth while.

    Returns:
        ``[..., D]``. It has no second derivatives.

    Raises:
        ValueError: the activation, its threshold or ``max_density`` is not possible.
        MemoryError: the compiled backend has no memory for its intermediate values.
        RuntimeError: in a backward pass with ``create_graph=True``.

    """
    check(activation, threshold, gated=up is not None)
    if not 0 <= max_density <= 1:
        raise ValueError(f"max_density={max_density} is not possible; it is a share of pairs, 0 to 1.")
    p = F.linear(x, first, first_bias)
    t = threshold.detach() if isinstance(threshold, Tensor) else threshold
    products = _products(p)
    if products is not None:
        decided = as_tokens(p.detach()).contiguous()
        silent = TABLE[activation].silent(decided, t)
        found = products.find(silent, decided, int(max_density * decided.numel()))
        if found is not None:
            tensors = as_tokens(x), first, up, down, first_bias, up_bias, down_bias
            cast = [one if one is None else one.to(p.dtype) for one in tensors]
            each = t[found[0].column] if isinstance(t, Tensor) else t
            y: Tensor = _Active.apply(*cast, activation, each, products, *found)
            return y.reshape(*x.shape[:-1], len(down))
    return reference.after_first(x, p, up, down, up_bias, down_bias, activation=activation, threshold=t)


def _products(p: Tensor) -> PairProducts | None:
    """Those of a backend; None where the dense formula is what there is, or what is wanted."""
    if torch.compiler.is_compiling() or not p.numel():
        return None
    forced = choice.forced_backend()
    if forced == AUTO and p.device.type != "cpu":
        return None  # no GPU has been measured
    found = choice.backend_with("pairs", p.dtype, forced, p.device.type)
    return None if found is None else found.pairs


class _Active(torch.autograd.Function):
    """The MLP, after its first projection has been found to be active in few pairs; with all gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        first: Tensor,
        up: Tensor | None,
        down: Tensor,
        first_bias: Tensor | None,
        up_bias: Tensor | None,
        down_bias: Tensor | None,
        activation: str,
        threshold: float | Tensor,
        products: PairProducts,
        pairs: Pairs,
        p: Tensor,
    ) -> Tensor:
        u = None
        if up is not None:
            sums = products.sampled(pairs, x, up)
            u = (sums if up_bias is None else sums + up_bias.float()[pairs.column]).to(x.dtype)
        ctx.rows, ctx.columns, ctx.products, ctx.activation = pairs.rows, pairs.columns, products, activation
        ctx.threshold, each = (None, threshold) if isinstance(threshold, Tensor) else (threshold, None)
        ctx.save_for_backward(x, first, up, down, p, u, pairs.start, pairs.column, each)
        h = _product(*_factors(activation, threshold, p, u))
        return products.product(pairs, [(h.float(), down.t())], down_bias, torch.empty_like(x))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "an MLP that skips in training has no second derivatives (create_graph=True); train it "
                "dense, as after hf_sparse.skip_in_training(model, 0)."
            )
        x, first, up, down, p, u, start, column, each = ctx.saved_tensors
        products: PairProducts = ctx.products
        pairs, need = Pairs(ctx.rows, ctx.columns, start, column), ctx.needs_input_grad
        row, t = TABLE[ctx.activation], each if ctx.threshold is None else ctx.threshold
        a, v = _factors(ctx.activation, t, p, u)
        grad_h = products.sampled(pairs, grad, down.t()).to(x.dtype)
        grad_p = (_product(grad_h, v) * row.slope(p, t)).float()
        of_layers = [(grad_p, first)]
        if up is not None:
            grad_u = grad_h * a
            of_layers.append(((grad_u * (u > 0) if row.relu_up else grad_u).float(), up))

        def of_weight(values: Tensor, weight: Tensor, other: Tensor) -> Tensor:
            to = torch.empty_like(weight)  # of the strides of the weight
            return products.product(across, [(values[place], other)], None, to)

        def of_bias(values: Tensor) -> Tensor:
            total = values.new_zeros(pairs.columns, dtype=torch.float64)
            return total.index_add_(0, column, values.double()).to(x.dtype)

        grads: list[Tensor | None] = [None] * 12
        if need[0]:
            grads[0] = products.product(pairs, of_layers, None, torch.empty_like(x))
        across, place = products.transposed(pairs) if any(need[1:4]) else (pairs, column)
        for i, (values, weight) in enumerate(of_layers):
            grads[1 + i] = of_weight(values, weight, x) if need[1 + i] else None
            grads[4 + i] = of_bias(values) if need[4 + i] else None
        grads[3] = of_weight(_product(a, v).float(), down.t(), grad).t() if need[3] else None
        grads[6] = grad.sum(0) if need[6] else None
        return tuple(grads)


def _factors(
    activation: str, threshold: float | Tensor, p: Tensor, u: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """What h is the product of."""
    row = TABLE[activation]
    return row.value(p, threshold), torch.relu(u) if u is not None and row.relu_up else u


def _product(a: Tensor, v: Tensor | None) -> Tensor:
    return a if v is None else a * v
