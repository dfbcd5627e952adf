"""L1 on the activations that reach the down projections: constant, warmed up, or growing in stages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from hf_sparse.fields import require
from hf_sparse.methods.method import Acting, Method, Term, Training
from hf_sparse.objectives import L1Penalty
from hf_sparse.objectives.l1 import Normalisation
from hf_sparse.schedules import LinearWarmup, SineStages

if TYPE_CHECKING:
    from hf_sparse.config import SparsityConfig


@dataclass(frozen=True, kw_only=True)
class L1(Method):
    """An L1 penalty with ``coefficient`` (arXiv 2603.23198), or in stages (ProSparse, arXiv 2402.13516)."""

    name = "l1"

    normalisation: Normalisation = "prosparse"
    """What the coefficients are meant for: prosparse (mean over tokens and neurons, sum over blocks),
    sakana_paper (mean over blocks, too), sakana_code (mean over tokens and blocks, sum over neurons)."""

    start: float = 0.0
    """Fraction of the run trained without it at first (stage 0 of ProSparse: substitution only)."""

    coefficient: float = 0.0
    """Constant coefficient, instead of stages."""

    warmup: float = 0.0
    """Fraction of the run, after start, over which a constant coefficient is reached linearly."""

    boundaries: list[float] = field(default_factory=list)
    """Fractions of the run at which the stages of the coefficient end, rising."""

    targets: list[float] = field(default_factory=list)
    """Coefficient reached at each boundary: constant in the first stage, then along sine curves."""

    scale: float = 1.0
    """Factor on all targets, or the coefficient, to fit a published schedule to another model."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("start", "warmup"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"methods.l1.{name}", value, "it must be a fraction, 0 to 1")
        for name in ("scale", "coefficient"):
            value = getattr(self, name)
            require(value >= 0, f"methods.l1.{name}", value, "it must be at least 0")
        ok = all(0 <= b <= 1 for b in self.boundaries)
        require(ok, "methods.l1.boundaries", self.boundaries, "they are fractions of the run, 0 to 1")
        staged = bool(self.targets or self.boundaries)
        for name in ("coefficient", "warmup"):
            value = getattr(self, name)
            mend = "targets say how it grows in stages; leave out the one or the others"
            require(not (staged and value), f"methods.l1.{name}", value, mend)
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

    def schedule(self, steps: int) -> SineStages | LinearWarmup:
        """The coefficient as a function of the step, in a run of ``steps`` updates."""
        if not (self.targets or self.boundaries):
            return LinearWarmup(self.coefficient * self.scale, self.warmup, self.start).scaled(steps)
        targets = tuple(t * self.scale for t in self.targets)
        return SineStages(tuple(self.boundaries), targets, self.start).scaled(steps)

    def attach(self, training: Training) -> Acting:
        return _Acting(L1Penalty(training.model, self.normalisation), self.schedule(training.steps))


class _Acting(Acting):
    def __init__(self, penalty: L1Penalty, schedule: SineStages | LinearWarmup) -> None:
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
