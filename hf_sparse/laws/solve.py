"""The best curve through points: from a grid of starts, since the sum of squares has flat valleys."""

from __future__ import annotations

import copy
import math
from typing import NamedTuple

import torch
from torch import Tensor

from hf_sparse.laws.curve import UNIT, Curve, Form
from hf_sparse.laws.least_squares import least_squares

PARAMETERS: dict[Form, int] = {"relu": 4, "silu": 3}
"""How many constants a form has."""

_STARTS = 24
"""Best points of the grid that the search goes on from."""
_STEPS = 400
_ALPHAS = (0.02, 20.0)
"""Exponents are kept between. At the lower end ReLU's form is a power law, to three digits and more; at the
upper one a step between two points."""


class Problem:
    """One form at fixed token counts.

    Inside, ``x = D / D_mean``, with the geometric mean, and the parameters are free numbers: the logarithms
    of alpha, of ``k`` (of ReLU ``c D_mean^alpha``, of SiLU ``c / D_mean^alpha``) and, of ReLU, of the
    amplitude ``e^b``; and the logit of the limit.
    """

    def __init__(self, form: Form, tokens: Tensor) -> None:
        """``tokens`` float64 ``[n]``."""
        self.form = form
        self.log_mean = float(tokens.log().mean())
        self.log_x = tokens.log() - self.log_mean
        most = torch.full((2, PARAMETERS[form]), torch.inf, dtype=torch.float64)
        most[0] = -torch.inf
        most[:, 0] = torch.tensor(_ALPHAS, dtype=torch.float64).log()
        self.bounds = (most[0], most[1])

    def at(self, parameters: Tensor, tokens: float) -> Tensor:
        """Values ``[N]`` of curves ``[N, P]`` after ``tokens``."""
        other = copy.copy(self)
        other.log_x = torch.tensor([math.log(tokens) - self.log_mean], dtype=torch.float64)
        return other(parameters)[0][:, 0]

    def __call__(self, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Values ``[N, n]`` and derivatives ``[N, n, P]``."""
        alpha, k = parameters[:, 0:1].exp(), parameters[:, 1:2].exp()
        limit = parameters[:, -1:].sigmoid()
        limit_slope = (limit * (1 - limit)).expand(-1, len(self.log_x))
        if self.form == "silu":
            part = k * (-alpha * self.log_x).exp()
            slopes = [part * alpha * self.log_x, -part, limit_slope]
            return limit - part, torch.stack(slopes, -1)
        power = k * (alpha * self.log_x).exp()
        part = (parameters[:, 2:3] - power).exp()
        by_power = (
            -part * power
        )  # overflows nowhere: an infinite power has a part of 0, which is then no number
        by_power = by_power.nan_to_num(0.0)
        slopes = [by_power * alpha * self.log_x, by_power, part, limit_slope]
        return part + limit, torch.stack(slopes, -1)

    def starts(self, ratios: Tensor) -> Tensor:
        """Parameters ``[starts, P]`` from a grid over alpha and k, where the rest is linear."""
        log_alpha = torch.linspace(math.log(0.03), math.log(5.0), 36, dtype=torch.float64)
        if self.form == "silu":
            log_k = torch.zeros(1, dtype=torch.float64)
        else:
            log_k = torch.linspace(math.log(1e-4), math.log(30.0), 36, dtype=torch.float64)
        grid = torch.cartesian_prod(log_alpha, log_k)
        alpha, k = grid[:, :1].exp(), grid[:, 1:].exp()
        if self.form == "silu":
            shape = -(-alpha * self.log_x).exp()
        else:
            shape = (
                -k * ((alpha * self.log_x).exp() - 1)
            ).exp()  # 1 in the middle, so that it is no tiny number
        centred = shape - shape.mean(1, keepdim=True)
        spread = centred.square().sum(1).clamp(min=1e-300)
        height = (centred @ (ratios - ratios.mean()) / spread).clamp(min=1e-9)
        limit = (ratios.mean() - height * shape.mean(1)).clamp(1e-4, 1 - 1e-4)
        squares = (height[:, None] * shape + limit[:, None] - ratios).square().sum(1)
        best = squares.nan_to_num(torch.inf).argsort()[:_STARTS]
        columns = [grid[best, 0], height[best].log(), limit[best].logit()]
        if self.form == "relu":
            columns[1:2] = [grid[best, 1], height[best].log() + grid[best, 1].exp()]
        return torch.stack(columns, 1)

    def alpha(self, parameters: Tensor) -> Tensor:
        """The exponents ``[N]`` of curves ``[N, P]``."""
        return parameters[:, 0].exp()

    def curve(self, parameters: Tensor) -> Curve:
        """What ``parameters`` ``[P]`` say, in the constants of the paper.

        Raises:
            ValueError: they are beyond what these can be.

        """
        alpha = float(self.alpha(parameters[None]))
        log_c = float(parameters[1]) + (1 if self.form == "silu" else -1) * alpha * (
            self.log_mean - math.log(UNIT)
        )
        try:
            return Curve(
                form=self.form,
                alpha=alpha,
                c=math.exp(log_c),
                b=float(parameters[2]) if self.form == "relu" else None,
                limit=float(parameters[-1].sigmoid()),
            )
        except OverflowError:
            raise ValueError(
                f"c=exp({log_c:.4g}) is out of range for a law of the activation ratio."
            ) from None


class Best(NamedTuple):
    """The best curve of a form."""

    problem: Problem
    parameters: Tensor
    """``[P]``."""
    values: Tensor
    """``[n]``: the curve at the points."""
    squares: float
    """Sum of squared residuals."""
    curve: Curve
    power_law: bool
    """Whether alpha is at the lower end of what it may be."""


def best_curve(form: Form, tokens: Tensor, ratios: Tensor) -> Best:
    """Least squares of the ratios, from the best points of a grid.

    Args:
        form: of the curve.
        tokens: float64 ``[n]``.
        ratios: float64 ``[n]``.

    Raises:
        ValueError: the points do not determine such a curve.

    """
    problem = Problem(form, tokens)
    start = problem.starts(ratios)
    solved = least_squares(problem, start, ratios.expand(len(start), -1), bounds=problem.bounds, steps=_STEPS)
    one = int(solved.squares.argmin())
    parameters = solved.parameters[one]
    values = problem(parameters[None])[0][0]
    trend = "falls" if form == "relu" else "rises"
    if float(values.max() - values.min()) < 1e-3 * float(ratios.max() - ratios.min()):
        raise ValueError(
            f"no curve of the form {form!r}, which {trend} with tokens, is nearer to the points than a "
            "constant."
        )
    alpha = float(problem.alpha(parameters[None]))
    if not bool(solved.converged[one]) or alpha > 0.999 * _ALPHAS[1]:
        raise ValueError(
            f"the fit of the form {form!r} did not converge (alpha={alpha:.4g}): the points show no bend "
            "that would hold it; give runs over a wider range of tokens, or leave out those of the warm-up."
        )
    at_end = alpha < 1.001 * _ALPHAS[0]
    squares = float(solved.squares[one])
    return Best(problem, parameters, values, squares, problem.curve(parameters), at_end)
