"""What a lever is to bring about, and how fast."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FLOOR = 1e-6
"""The least density of which a logarithm is taken."""
_MISSED = 0.01
"""In sparsity, below the target: what is said to have missed it."""
_RANGE = 3.0
"""In ln(density), from a half to a fortieth: what a budget is offered in the time that there is."""
_FASTEST = 0.004
"""In ln(density) per update: what sparsity costs shows some dozens of updates later."""
_LAST = 0.2
"""The share of the run in the end in which sparsity is raised less and less, so that a budget is kept."""
_OVERDRAWN = -2.0
"""Of a budget: how fast sparsity falls then, in shares of how fast it rises with all of it left."""


@dataclass(frozen=True)
class Goal:
    """A density, or a limit of the held-out loss, and the updates in which to come there."""

    steps: int
    """Of the whole run."""
    start: float
    """Updates without anything."""
    by: float
    """Updates until the density is reached, or until it falls less and less."""
    density: float | None
    """ln of the wanted one."""
    limit: float | None = None
    """Of the held-out loss, in nats; one of the two is given."""
    budget: float = 0.0
    """In nats, above the loss of the dense model."""

    def ramp(self, step: int, begin: float, first: float) -> float:
        """What is wanted now, as ln of the density, if it was ``first`` after ``begin`` updates."""
        assert self.density is not None
        # Whoever begins too late (activations were mixed) has the rest of the run.
        end = self.by if self.by > begin else self.steps
        passed = (step - begin) / (end - begin) if end > begin else 1.0
        return first + (self.density - first) * min(max(passed, 0.0), 1.0)

    def tell_if_missed(self, sparsity: float | None, why: str) -> None:
        """Warn if a sparsity was to be reached and the one in the end is below it; ``why`` that may be."""
        if self.density is None:
            return
        wanted = 1 - math.exp(self.density)
        if sparsity is None or sparsity < wanted - _MISSED:
            found = "none was counted" if sparsity is None else f"it is {sparsity:.3f} in the end"
            warnings.warn(
                f"methods.target_sparsity.sparsity={wanted:g} was not reached: {found}; {why}.", stacklevel=3
            )

    def tell_if_more(self, sparsity: float | None) -> None:
        """Warn if less was wanted than the activation gives by itself, which is ``sparsity``."""
        if self.density is None or sparsity is None:
            return
        wanted = 1 - math.exp(self.density)
        if sparsity > wanted + _MISSED:
            warnings.warn(
                f"methods.target_sparsity.sparsity={wanted:g} is less than the {sparsity:.3f} that the "
                "activation gives without thresholds; they stayed 0.",
                stacklevel=3,
            )

    def left(self, step: int) -> float:
        """1, and in the last part of the run less, down to 0 in the end."""
        return min(max((self.steps - step) / (_LAST * self.steps), 0.0), 1.0)

    def change(self, step: int, slack: float) -> float:
        """Of ln of the wanted density in an update: the more the more of the budget is left.

        ``slack`` is how many nats the held-out loss is below the limit. In the end it only rises.
        """
        share = min(slack / self.budget, 1.0) * self.left(step) if slack > 0 else _OVERDRAWN
        return -min(_RANGE / (self.by - self.start), _FASTEST) * share


def require_lever(state: Mapping[str, Any], lever: str) -> None:
    """Refuse the state of another lever.

    Raises:
        ValueError: it is one.

    """
    if (other := state.get("lever")) != lever:
        raise ValueError(
            f"the checkpoint was made with methods.target_sparsity.lever={other or 'l1'}, and now it is "
            f"{lever}: give the one that it was, or begin anew."
        )
