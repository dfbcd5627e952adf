"""Kullback-Leibler divergences between the next-token distributions of a teacher and a student."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_AT_ONCE = 1 << 24
"""Logits in float32 at a time: 64 MiB a copy."""


def kl_divergence(
    student: Tensor,
    teacher: Tensor,
    counted: Tensor,
    *,
    forward: float = 0.5,
    reverse: float = 0.5,
    temperature: float = 1.0,
) -> Tensor:
    """``T^2 (forward * KL(p || q) + reverse * KL(q || p))``, the mean over the counted tokens, in nats.

    ``p = softmax(teacher / T)`` and ``q = softmax(student / T)``; the factor keeps gradients of one size at
    any temperature (Hinton et al., arXiv 1503.02531). Tokens are taken a few at a time, so that there are
    float32 copies of those only; what is kept for backward is the gradient, as large as ``student``.

    Args:
        student: logits ``[..., V]``, any floating dtype, with gradient.
        teacher: logits of the same shape, without gradient.
        counted: bool ``[...]``; what the others hold, NaN included, does not matter.
        forward: weight of ``KL(p || q)``, which covers all that the teacher finds likely.
        reverse: weight of ``KL(q || p)``, which avoids what the teacher finds unlikely.
        temperature: ``T > 0``.

    Returns:
        float32 scalar (float64 for float64); 0 if no token counts.

    Raises:
        ValueError: the shapes differ.

    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"the student has logits {list(student.shape)} and the teacher {list(teacher.shape)}; both have "
            "to read the same tokens and to have one vocabulary."
        )
    size = student.shape[-1]
    flat = [student.reshape(-1, size), teacher.detach().to(student.device).reshape(-1, size)]
    value: Tensor = _Divergence.apply(
        *flat, counted.to(student.device).flatten(), forward, reverse, temperature
    )
    return value


class _Divergence(torch.autograd.Function):
    """Over ``[N, V]``, of which ``counted [N]`` count. The gradient is computed along with the value."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, counted: Tensor, *settings: float) -> Tensor:
        forward, reverse, temperature = settings
        dtype = torch.promote_types(student.dtype, torch.float32)
        total = torch.zeros((), dtype=dtype, device=student.device)
        share = 1 / counted.count_nonzero().clamp(min=1).to(dtype)
        gradient = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        rows = max(1, _AT_ONCE // student.shape[-1])
        for start in range(0, len(student), rows):
            part = slice(start, start + rows)
            left_out = ~counted[part, None]
            log_q = (student[part].to(dtype) / temperature).log_softmax(-1)
            log_p = (teacher[part].to(dtype) / temperature).log_softmax(-1)
            q, p, ratio = log_q.exp(), log_p.exp(), log_p - log_q
            backwards = -(q * ratio).sum(-1, keepdim=True)
            value = forward * (p * ratio).sum(-1, keepdim=True) + reverse * backwards
            total += temperature**2 * share * value.masked_fill(left_out, 0).sum()
            if gradient is not None:
                slope = forward * (q - p) - reverse * q * (ratio + backwards)
                gradient[part] = (temperature * share * slope).masked_fill(left_out, 0)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(outer), None, None, None, None, None
