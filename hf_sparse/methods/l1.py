"""L1 on the activations that reach the down projections, with a coefficient that grows in stages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from hf_sparse.fields import require
from hf_sparse.methods.method import Acting, Method, Term, Training
from hf_sparse.objectives import L1Penalty
from hf_sparse.schedules import SineStages

if TYPE_CHECKING:
    from hf_sparse.config import SparsityConfig


@dataclass(frozen=True, kw_only=True)
class L1(Method):
    """The progressive L1 penalty of ProSparse (arXiv 2402.13516, section 3.2).

    The penalty is the mean of |h| over tokens and neurons, summed over blocks; h enters the down projection.
    """

    name = "l1"

    start: float = 0.0
    """Fraction of the run trained without it at first (stage 0 of ProSparse: substitution only)."""

    boundaries: list[float] = field(default_factory=list)
    """Fractions of the run at which the stages of the coefficient end, rising."""

    targets: list[float] = field(default_factory=list)
    """Coefficient reached at each boundary: constant in the first stage, then along sine curves."""

    scale: float = 1.0
    """Factor on all targets, to fit a published schedule to another model."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.start <= 1, "methods.l1.start", self.start, "it must be a fraction, 0 to 1")
        require(self.scale >= 0, "methods.l1.scale", self.scale, "it must be at least 0")
        ok = all(0 <= b <= 1 for b in self.boundaries)
        require(ok, "methods.l1.boundaries", self.boundaries, "they are fractions of the run, 0 to 1")
        try:
            self.schedule(1)
        except ValueError as error:
            raise ValueError(f"methods.l1: {error}") from None

    def check(self, sparsity: SparsityConfig | None) -> None:
        if sparsity is None:
            raise ValueError(
                "methods.l1 has no meaning with patch=none, the dense baseline: its activations are never "
                "exactly zero. Leave it out, or choose an activation."
            )

    def schedule(self, steps: int) -> SineStages:
        """The coefficient as a function of the step, in a run of ``steps`` updates."""
        targets = tuple(t * self.scale for t in self.targets)
        return SineStages(tuple(self.boundaries), targets, self.start).scaled(steps)

    def attach(self, training: Training) -> Acting:
        return _Acting(L1Penalty(training.model), self.schedule(training.steps))


class _Acting(Acting):
    def __init__(self, penalty: L1Penalty, schedule: SineStages) -> None:
        self._penalty, self._schedule = penalty, schedule
        self._coefficient = 0.0

    def before_step(self, step: int) -> None:
        self._coefficient = self._schedule.at(step)

    def loss(self, step: int, batch: Mapping[str, Tensor], output: Any) -> dict[str, Term]:
        return {"l1": Term(self._penalty.value(), self._coefficient)}

    def values(self) -> dict[str, float]:
        return {"l1_coefficient": self._coefficient}

    def detach(self) -> None:
        self._penalty.remove()
