"""Schedules of a sparsifying finetune: pure functions of the step, so there is no state to save.

Steps count optimizer updates from 1: ``schedule.at(1)`` is the value used by the first update.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class SineStages:
    """The progressive L1 coefficient of ProSparse (arXiv 2402.13516, section 3.2).

    Up to ``start`` the coefficient is 0 (the model settles on its new activation). Then, with boundaries
    ``T_1 < ... < T_S`` and targets ``l_1 ... l_S``, at step t::

        t <= T_1:                l(t) = l_1                                  (constant warm-up)
        T_{i-1} < t <= T_i:      l(t) = l_{i-1} + eta * (l_i - l_{i-1})
                                 eta  = (sin(-pi/2 + pi * (t - T_{i-1}) / (T_i - T_{i-1})) + 1) / 2
        t > T_S:                 l(t) = l_S

    Two equal targets in a row are a flat stage, in which the model settles.

    Raises:
        ValueError: lengths differ, boundaries do not rise, or a value is negative or not finite.

    """

    boundaries: tuple[float, ...]
    """The last step of each stage, rising, in steps."""

    targets: tuple[float, ...]
    """The coefficient reached at each boundary, at least 0."""

    start: float = 0.0
    """The coefficient is 0 up to and with this step."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "boundaries", _numbers("boundaries", self.boundaries))
        object.__setattr__(self, "targets", _numbers("targets", self.targets))
        if len(self.boundaries) != len(self.targets):
            raise ValueError(
                f"boundaries has {len(self.boundaries)} values and targets {len(self.targets)}; "
                "each stage needs one of both."
            )
        if not (isinstance(self.start, int | float) and math.isfinite(self.start) and self.start >= 0):
            raise ValueError(f"start={self.start!r} is not a step; give a number that is at least 0.")
        for earlier, later in itertools.pairwise((self.start, *self.boundaries)):
            if later <= earlier:
                raise ValueError(
                    f"boundaries={list(self.boundaries)} with start={self.start} do not rise; "
                    "each stage must end after the one before it."
                )
        if any(t < 0 for t in self.targets):
            raise ValueError(f"targets={list(self.targets)} has a negative coefficient; use 0 or more.")

    def at(self, step: float) -> float:
        """The coefficient of the update ``step`` (from 1)."""
        if not self.targets or step <= self.start:
            return 0.0
        if step <= self.boundaries[0]:
            return self.targets[0]
        for i in range(1, len(self.targets)):
            begin, end = self.boundaries[i - 1], self.boundaries[i]
            if step <= end:
                eta = (math.sin(-math.pi / 2 + math.pi * (step - begin) / (end - begin)) + 1) / 2
                return self.targets[i - 1] + eta * (self.targets[i] - self.targets[i - 1])
        return self.targets[-1]

    def scaled(self, steps: float) -> SineStages:
        """The same shape with boundaries and start multiplied by ``steps``: fractions become steps."""
        return SineStages(tuple(b * steps for b in self.boundaries), self.targets, self.start * steps)


@dataclass(frozen=True)
class LinearWarmup:
    """A coefficient that is 0 up to ``start``, rises linearly over ``length`` steps, and then stays.

    With ``start = length = 0`` it is constant (arXiv 2603.23198); with 5,000 steps of each it is the warm-up
    that the paper compares to.

    Raises:
        ValueError: a value is negative or not finite.

    """

    coefficient: float
    """Reached at step ``start + length``, at least 0."""
    length: float = 0.0
    """In steps."""
    start: float = 0.0
    """The coefficient is 0 up to and with this step."""

    def __post_init__(self) -> None:
        for name in ("coefficient", "length", "start"):
            (value,) = _numbers(name, [getattr(self, name)])
            if value < 0:
                raise ValueError(f"{name}={value} is negative; use 0 or more.")

    def at(self, step: float) -> float:
        """The coefficient of the update ``step`` (from 1)."""
        passed = step - self.start
        if passed <= 0:
            return 0.0
        return self.coefficient * (1.0 if passed >= self.length else passed / self.length)

    def scaled(self, steps: float) -> LinearWarmup:
        """The same shape with start and length multiplied by ``steps``: fractions become steps."""
        return LinearWarmup(self.coefficient, self.length * steps, self.start * steps)


def linear_mix(step: float, steps: float) -> float:
    """Share of the new activation at update ``step`` (from 1) of a mix over ``steps`` updates.

    ``min(step / steps, 1)``, as in arXiv 2605.25612; with ``steps <= 0`` the new activation is in place from
    the first update on.
    """
    return 1.0 if steps <= 0 else min(max(step / steps, 0.0), 1.0)


def learning_rate_share(
    step: int, steps: int, *, warmup: int = 0, decay: str = "cosine", final: float = 0.0
) -> float:
    """Share of the peak learning rate at update ``step`` (from 1) of ``steps``.

    Rises linearly over ``warmup`` updates (the last of them uses the full rate), then falls to ``final`` at
    update ``steps``: along half a cosine (``"cosine"``), a line (``"linear"``), or not at all
    (``"constant"``). ``"inverse_sqrt"`` is ``sqrt(warmup / step)`` as in the T5 paper (arXiv 1910.10683),
    with a ``warmup`` of at least 1, and stays at ``final`` where it would fall below.

    Raises:
        ValueError: an unknown ``decay``.

    """
    if decay not in DECAYS:
        raise ValueError(f"decay={decay!r} is not known; choose one of {', '.join(DECAYS)}.")
    if step <= warmup:
        return step / warmup
    if decay == "constant":
        return 1.0
    if decay == "inverse_sqrt":
        return max(final, math.sqrt(max(warmup, 1) / min(step, steps)))
    progress = min((step - warmup) / max(steps - warmup, 1), 1.0)
    shape = (1 + math.cos(math.pi * progress)) / 2 if decay == "cosine" else 1 - progress
    return final + (1 - final) * shape


DECAYS = ("cosine", "linear", "constant", "inverse_sqrt")
"""Shapes accepted by :func:`learning_rate_share`."""


def _numbers(name: str, values: Sequence[Any]) -> tuple[float, ...]:
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{name} holds {value!r}, which is not a finite number.")
    return tuple(float(value) for value in values)
