"""Gradients of the operators: those of the dense formula, recomputed from the inputs."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from triton_ops.activations import TABLE
from triton_ops.layout import as_tokens


def save_gated_mlp(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """What :func:`gated_mlp_backward` needs."""
    ctx.save_for_backward(*inputs[:7], inputs[9])
    ctx.activation, ctx.threshold = inputs[-3:-1]


def gated_mlp_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """Gradients of the operator's tensors from x to the down bias, and none of the rest."""
    x, gate, up, down, gate_bias, up_bias, _, thresholds = ctx.saved_tensors
    need = ctx.needs_input_grad
    p, u = F.linear(x, gate, gate_bias), F.linear(x, up, up_bias)
    row = TABLE[ctx.activation]
    t = ctx.threshold if thresholds is None else thresholds
    a, slope = row.value(p, t), row.slope(p, t)
    v = torch.relu(u) if row.relu_up else u
    grad_h = grad @ down
    grad_p, grad_u = grad_h * v * slope, grad_h * a
    if row.relu_up:
        grad_u = grad_u * (u > 0)
    return (
        grad_p @ gate + grad_u @ up if need[0] else None,
        as_tokens(grad_p).t() @ as_tokens(x) if need[1] else None,
        as_tokens(grad_u).t() @ as_tokens(x) if need[2] else None,
        as_tokens(grad).t() @ as_tokens(a * v) if need[3] else None,
        as_tokens(grad_p).sum(0) if need[4] else None,
        as_tokens(grad_u).sum(0) if need[5] else None,
        as_tokens(grad).sum(0) if need[6] else None,
        *[None] * 7,
    )


def save_plain_mlp(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """What :func:`plain_mlp_backward` needs."""
    ctx.save_for_backward(*inputs[:4], inputs[7])
    ctx.activation, ctx.threshold = inputs[-3:-1]


def plain_mlp_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """The same without a gate."""
    x, up, down, up_bias, thresholds = ctx.saved_tensors
    need = ctx.needs_input_grad
    p = F.linear(x, up, up_bias)
    row = TABLE[ctx.activation]
    t = ctx.threshold if thresholds is None else thresholds
    a, grad_p = row.value(p, t), (grad @ down) * row.slope(p, t)
    return (
        grad_p @ up if need[0] else None,
        as_tokens(grad_p).t() @ as_tokens(x) if need[1] else None,
        as_tokens(grad).t() @ as_tokens(a) if need[2] else None,
        as_tokens(grad_p).sum(0) if need[3] else None,
        as_tokens(grad).sum(0) if need[4] else None,
        *[None] * 7,
    )


def save_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """What :func:`linear_backward` needs."""
    ctx.save_for_backward(inputs[0], inputs[1])


def linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of ``input, weight, bias``, and none of the backend."""
    h, weight = ctx.saved_tensors
    need = ctx.needs_input_grad
    return (
        grad @ weight if need[0] else None,
        as_tokens(grad).t() @ as_tokens(h) if need[1] else None,
        as_tokens(grad).sum(0) if need[2] else None,
        None,
    )
