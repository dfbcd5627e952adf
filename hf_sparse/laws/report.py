"""A fitted law: its constants, what it predicts, a table, JSON, a plot."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_sparse.laws.curve import UNIT, Curve, require_tokens
from hf_sparse.laws.points import Point
from hf_sparse.laws.solve import Problem
from triton_ops.table import table


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The activation ratio of a law after some training."""

    tokens: float
    """Trained on."""
    ratio: float
    """Share of neurons that are not silent, 0 to 1."""
    low: float
    """Lower end of the interval of the curve there; a single measurement scatters more."""
    high: float
    """Upper end."""
    times: float
    """``tokens`` over the most tokens of a point: above 1 it is extrapolated."""

    def __str__(self) -> str:
        far = f" ({self.times:.3g} times the tokens of the last point)" if self.times > 1 else ""
        return f"{self.tokens:,.0f} tokens: {self.ratio:.2%}, {self.low:.2%} to {self.high:.2%}{far}"


@dataclass(frozen=True, kw_only=True)
class SparsingLaw:
    """What :func:`hf_sparse.fit_sparsing_law` found; ``print`` shows it as a table."""

    curve: Curve
    """The law with its constants, those of the paper: D in billions of tokens."""
    points: tuple[Point, ...]
    """Tokens and activation ratio of each point, by tokens."""
    runs: int
    """Runs that the points are of."""
    residual: float
    """Root of the mean squared difference between points and curve."""
    confidence: float
    """Of the intervals, such as 0.95."""
    chosen: str
    """How the form was chosen."""
    power_law: bool
    """Whether alpha went to the least that it may be, 0.02: then the curve is a power law of the tokens,
    and the constants beside the limit say nothing one by one."""
    draws: Tensor = field(repr=False, compare=False)
    """float64 ``[draws, P]``: curves of the bootstrap, as ``problem`` takes them."""
    problem: Problem = field(repr=False, compare=False)

    @property
    def form(self) -> str:
        """``"relu"`` or ``"silu"``."""
        return self.curve.form

    @property
    def limit(self) -> float:
        """The activation ratio without end of training."""
        return self.curve.limit

    def intervals(self) -> dict[str, tuple[float, float]]:
        """Lower and upper end of each constant, by name."""
        alpha = self.problem.alpha(self.draws)
        shift = alpha * (self.problem.log_mean - math.log(UNIT))
        found = {"alpha": alpha, "c": (self.draws[:, 1] + (shift if self.form == "silu" else -shift)).exp()}
        if self.form == "relu":
            found["b"] = self.draws[:, 2]
        found["limit"] = self.draws[:, -1].sigmoid()
        return {name: self._between(values) for name, values in found.items()}

    def predict(self, tokens: float) -> Prediction:
        """The activation ratio after ``tokens`` tokens of training, with its interval.

        Raises:
            ValueError: no positive number, or so few that the curve is outside of 0 to 1.

        """
        ratio = self.curve(require_tokens(tokens))
        if not 0 <= ratio <= 1:
            raise ValueError(
                f"at tokens={tokens:g} the law would give an activation ratio of {ratio:.4g}: it does not "
                f"hold so early. Its points are of {self.points[0][0]:,.0f} tokens and more."
            )
        low, high = self._between(self.problem.at(self.draws, tokens))
        times = tokens / self.points[-1][0]
        return Prediction(tokens=tokens, ratio=ratio, low=max(0.0, low), high=min(1.0, high), times=times)

    def _between(self, values: Tensor) -> tuple[float, float]:
        ends = torch.tensor([(1 - self.confidence) / 2, (1 + self.confidence) / 2], dtype=values.dtype)
        low, high = values.quantile(ends).tolist()
        return low, high

    def __str__(self) -> str:
        constants = {"alpha": self.curve.alpha, "c": self.curve.c, "b": self.curve.b, "limit": self.limit}
        rows: list[tuple[str, ...] | None] = [
            ("constant", "value", f"{self.confidence:.0%} from", "to"),
            None,
        ]
        for name, (low, high) in self.intervals().items():
            rows.append((name, f"{constants[name]:.4g}", f"{low:.4g}", f"{high:.4g}"))
        first, last = self.points[0][0], self.points[-1][0]
        power = "alpha is the least that it may be: a power law fits as well\n" if self.power_law else ""
        return (
            f"{table(rows)}\n"
            f"{self.curve}, D in billions of tokens\n"
            f"{len(self.points)} points of {self.runs} run{'s' if self.runs > 1 else ''}, {first:,.0f} to "
            f"{last:,.0f} tokens; residual {self.residual:.3g}\n"
            f"{self.chosen}\n{power}"
            "A: activation ratio, one minus sparsity; the intervals take the errors of points for independent"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; the end of an interval that is too large for a float is None."""
        intervals = {
            name: [end if math.isfinite(end) else None for end in ends]
            for name, ends in self.intervals().items()
        }
        return {
            "form": self.form,
            "chosen": self.chosen,
            "power_law": self.power_law,
            "unit_of_tokens": UNIT,
            "constants": {
                "alpha": self.curve.alpha,
                "c": self.curve.c,
                "b": self.curve.b,
                "limit": self.limit,
            },
            "confidence": self.confidence,
            "intervals": intervals,
            "residual": self.residual,
            "runs": self.runs,
            "points": [list(point) for point in self.points],
        }

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """The law as JSON text, also written to ``path`` if one is given."""
        text = json.dumps(self.to_dict(), indent=2, allow_nan=False)
        if path is not None:
            Path(path).write_text(text + "\n", encoding="utf-8")
        return text

    def plot(self, path: str | os.PathLike[str], *, tokens: float | None = None) -> Path:
        """Draw points, curve and interval into an image file; its ending (png, svg, pdf) chooses the format.

        Args:
            path: where to write.
            tokens: draw up to so many; default: ten times those of the last point.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: ``tokens`` is no positive number.

        """
        from hf_sparse.laws.plot import draw

        return draw(self, Path(path), None if tokens is None else require_tokens(tokens))
