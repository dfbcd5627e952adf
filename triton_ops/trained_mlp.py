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
from triton_ops.activations import TABLE
from triton_ops.backends import AUTO
from triton_ops.layout import as_tokens
from triton_ops.mlp import MLP
from triton_ops.ops import check_mlp, check_threshold
from triton_ops.pairs import PairProducts, Pairs, require_share
from triton_ops.unobserved import is_plain_cpu


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
        ValueError: an argument does not fit in shape, dtype, device or value; the message names it.
        MemoryError: the compiled backend has no memory for its intermediate values.
        RuntimeError: in a backward pass with ``create_graph=True``.

    """
    require_share("max_density", max_density)
    if choice.autocasts(x.device.type):
        x, first, down = (_cast(t) for t in (x, first, down))
        up, first_bias, up_bias, down_bias = (
            None if t is None else _cast(t) for t in (up, first_bias, up_bias, down_bias)
        )
    mlp = MLP(first, up, down, first_bias, up_bias, down_bias, activation, threshold)
    check_mlp(x, mlp)
    check_threshold(threshold)
    p = F.linear(x, first, first_bias)
    others = first, up, down, first_bias, up_bias, down_bias
    products = _products(p, x, *others, threshold)
    if products is not None:
        decided = as_tokens(p.detach()).contiguous()
        silent = TABLE[activation].silent(decided, threshold)
        found = products.find(silent, decided, int(max_density * decided.numel()))
        if found is not None:
            each = threshold[found[0].column] if isinstance(threshold, Tensor) else threshold
            y: Tensor = _Active.apply(as_tokens(x), *others, activation, each, products, *found)
            return y.reshape(*x.shape[:-1], len(down))
    return reference.after_first(
        x, p, up, down, up_bias, down_bias, activation=activation, threshold=threshold
    )


def _cast(tensor: Tensor) -> Tensor:
    """As autocast does for a product, once for both passes."""
    if tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(tensor.device.type))


def _products(p: Tensor, x: Tensor, *others: Any) -> PairProducts | None:
    """Those of a backend; None where the dense formula is what there is, or what is wanted."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or not (p.numel() and x.numel()):
        return None
    forced, device = choice.forced_backend(), p.device.type
    if forced == AUTO and device != "cpu":
        return None  # no GPU has been measured
    tensors = [one for one in (p, x, *others) if isinstance(one, Tensor)]
    if not all(is_plain_cpu(one) if device == "cpu" else _is_plain(one) for one in tensors):
        return None
    found = choice.backend_with("pairs", p.dtype, forced, device)
    return None if found is None else found.pairs


def skips(weight: Tensor) -> bool:
    """Whether :func:`trained_mlp` can skip with such a first projection ``[F, D]``."""
    return _products(weight, weight) is not None


def _is_plain(tensor: Tensor) -> bool:
    """Whether it holds its very numbers."""
    return type(tensor) in (Tensor, torch.nn.Parameter) and not tensor.is_neg()


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
        ctx.products, ctx.activation, ctx.size = products, activation, (pairs.rows, pairs.columns)
        weights = first, up, down.t()
        ctx.weights = [None if w is None else torch.empty_like(w, device="meta") for w in weights]
        ctx.threshold, each = (None, threshold) if isinstance(threshold, Tensor) else (threshold, None)
        need = ctx.needs_input_grad
        ctx.save_for_backward(
            x if need[1] or need[2] else None,
            *((first, up) if need[0] else (None, None)),
            down,
            *(p, u, pairs.start, pairs.column, each),
        )
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
        rows, columns = ctx.size
        pairs, need = Pairs(rows, columns, start, column), ctx.needs_input_grad
        row, t = TABLE[ctx.activation], each if ctx.threshold is None else ctx.threshold
        a, v = _factors(ctx.activation, t, p, u)
        grad = _arrived(grad)
        grad_h = products.sampled(pairs, grad, down.t()).to(p.dtype)
        of_layers = [((_product(grad_h, v) * row.slope(p, t)).float(), first)]
        if u is not None:
            grad_u = grad_h * a
            of_layers.append(((grad_u * (u > 0) if row.relu_up else grad_u).float(), up))
        grads: list[Tensor | None] = [None] * 12
        if need[0]:
            grads[0] = products.product(pairs, of_layers, None, torch.empty_like(grad))
        if any(need[1:4]):
            across, place = products.transposed(pairs)
            factors = {1 + i: (value, x) for i, (value, _) in enumerate(of_layers)}
            factors[3] = _product(a, v).float(), grad
            for i, (value, other) in factors.items():
                if need[i]:
                    to = torch.empty_like(ctx.weights[i - 1], device=grad.device)  # of the weight's strides
                    grads[i] = products.product(across, [(value[place], other)], None, to)
            grads[3] = None if grads[3] is None else grads[3].t()
        for i, (value, _) in enumerate(of_layers, 4):
            if need[i]:
                total = value.new_zeros(columns, dtype=torch.float64)
                grads[i] = total.index_add_(0, column, value.double()).to(p.dtype)
        grads[6] = grad.sum(0) if need[6] else None
        return tuple(grads)


def _arrived(grad: Tensor) -> Tensor:
    """The very numbers of ``grad``, which may be lazily negated, or still be on its way from a process."""
    grad = grad.resolve_neg()
    grad = grad if _is_plain(grad) else grad.clone()
    if not _is_plain(grad):
        raise RuntimeError(
            f"an MLP that skips in training got a gradient that is a {type(grad).__name__} and no plain "
            "tensor; train it dense: hf_sparse.skip_in_training(model, 0)."
        )
    return grad


def _factors(
    activation: str, threshold: float | Tensor, p: Tensor, u: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """What h is the product of."""
    row = TABLE[activation]
    return row.value(p, threshold), torch.relu(u) if u is not None and row.relu_up else u


def _product(a: Tensor, v: Tensor | None) -> Tensor:
    return a if v is None else a * v
