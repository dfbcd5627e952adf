"""Nonlinear least squares of many small problems at once: Levenberg-Marquardt in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

_SMALL = 1e-10
"""A relative decrease of the sum of squares that is not worth another step."""
_ROUNDING = 1e-27
"""A sum of squared residuals, relative to that of the values, that is no more than rounding."""
_HOPELESS = 1e14


class Solved(NamedTuple):
    """Where each of N problems ended."""

    parameters: Tensor
    """``[N, P]``."""
    squares: Tensor
    """``[N]``: sum of squared residuals."""
    converged: Tensor
    """bool ``[N]``."""


def least_squares(
    model: Callable[[Tensor], tuple[Tensor, Tensor]],
    start: Tensor,
    target: Tensor,
    *,
    bounds: tuple[Tensor, Tensor],
    steps: int,
) -> Solved:
    """Minimise ``sum((model(parameters) - target)²)`` for each row of ``start``.

    A step solves the normal equations with their diagonal enlarged by a damping, which grows until the step
    lowers the sum (Marquardt, 1963, https://doi.org/10.1137/0111030).

    Args:
        model: of parameters ``[N, P]`` the values ``[N, n]`` and their derivatives ``[N, n, P]``.
        start: float64 ``[N, P]``.
        target: float64 ``[N, n]``.
        bounds: ``[P]`` each: the least and the most of each parameter, where it stays.
        steps: at most.

    """
    at, (low, high) = start.clone(), bounds
    damping = torch.full((len(at),), 1e-3, dtype=at.dtype)
    done = torch.zeros(len(at), dtype=torch.bool)
    values, slopes = model(at)
    squares = _squares(values - target)
    exact = _ROUNDING * _squares(target)
    for _ in range(steps):
        gradient = torch.einsum("nip,ni->np", slopes, values - target)
        normal = torch.einsum("nip,niq->npq", slopes, slopes)
        scale = normal.diagonal(dim1=1, dim2=2)
        floor = scale.amax(1, keepdim=True) * 1e-12 + 1e-300  # a parameter that nothing depends on, yet
        normal = normal + torch.diag_embed(damping[:, None] * scale + floor)
        step = _solution(normal, gradient)
        at_end = ((at <= low) & (step < 0)) | ((at >= high) & (step > 0))
        step = _solution(_without(normal, at_end), gradient.masked_fill(at_end, 0.0))
        tried = at + step * _share(at, step, low, high)
        new_values, new_slopes = model(tried)
        new = _squares(new_values - target)
        better = (new <= squares) & ~done
        # With a large damping a step that changes nothing is no reason to try smaller ones again.
        small = better & (squares - new <= _SMALL * squares) & ((damping < 1) | (new == squares))
        damping = torch.where(better, damping / 5, damping * 4).clamp(1e-15, 10 * _HOPELESS)
        at = torch.where(better[:, None], tried, at)
        values = torch.where(better[:, None], new_values, values)
        slopes = torch.where(better[:, None, None], new_slopes, slopes)
        squares = torch.where(better, new, squares)
        done = done | small | (damping >= _HOPELESS) | (squares <= exact)
        if bool(done.all()):
            break
    return Solved(at, squares, done)


def _squares(residuals: Tensor) -> Tensor:
    return residuals.square().sum(-1).nan_to_num(torch.inf, torch.inf, torch.inf)


def _solution(normal: Tensor, gradient: Tensor) -> Tensor:
    step, info = torch.linalg.solve_ex(normal, -gradient)
    return step.masked_fill((info != 0)[:, None], 0.0).nan_to_num(0.0, 0.0, 0.0)


def _without(normal: Tensor, fixed: Tensor) -> Tensor:
    """The equations of the parameters that are not ``fixed``, bool ``[N, P]``; others step by 0."""
    free = (~fixed).to(normal.dtype)
    return normal * free[:, :, None] * free[:, None, :] + torch.diag_embed(1 - free)


def _share(at: Tensor, step: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """How much of each step ``[N, 1]`` can be gone: to a bound, or by 3, since they are logarithms."""
    room = torch.where(step < 0, at - low, high - at).clamp(max=3.0)
    share = (room / step.abs().clamp(min=1e-300)).clamp(max=1.0)
    return share.masked_fill(step == 0, 1.0).amin(1, keepdim=True)
