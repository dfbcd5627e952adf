"""The user states a sparsity, or what it may cost in perplexity; thresholds, or an L1 penalty, follow."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_sparse.fields import require
from hf_sparse.levers import ByPenalty, ByThreshold, Goal, has_thresholds, why_not
from hf_sparse.methods.method import Acting, Method, Training

if TYPE_CHECKING:
    from hf_sparse.config import SparsityConfig

_EVALUATIONS = 4
"""As many at least to find out what sparsity costs."""
_MARGIN = 0.9
"""The share of a budget that is aimed at."""

LEVERS = ("threshold", "l1")


@dataclass(frozen=True, kw_only=True)
class TargetSparsity(Method):
    """What makes neurons silent is controlled: by a sparsity to be reached, or by a budget in perplexity.

    Ours; see :class:`~hf_sparse.levers.rising_threshold.RisingThreshold` and
    :class:`~hf_sparse.levers.control.DensityControl`. Sparsity is the share of exact zeros in training
    forwards, over tokens, neurons and patched blocks: by thresholds of what they silence, by L1 of what
    reaches the down projections.
    """

    name = "target_sparsity"
    excludes = ("l1",)

    sparsity: float | None = None
    """Share of exact zeros to be reached, below 1."""

    perplexity: float | None = None
    """Instead: raise sparsity as long as the held-out perplexity is at most so many percent above that of the
    dense model. Evaluations steer it, so eval_every is a part of what is learned."""

    lever: str | None = None
    """What brings it about. ``"threshold"``, for ReLU, FATReLU and CATS: the thresholds of the activation
    rise; ReLU becomes FATReLU. ``"l1"``, for all: an L1 penalty whose coefficient is found; the activation
    stays as it is. None: thresholds, if the activation can have some."""

    dense_perplexity: float | None = None
    """What that of the dense model is; none: of the model before the patch, as the run measures it. One that
    was finetuned on the same tokens is the fairer one."""

    start: float = 0.0
    """Fraction of the run in which nothing is done at first."""

    by: float = 0.4
    """Fraction of the run in which the sparsity is reached, rising evenly in ln(density); then it is held.
    With a perplexity, from here on it rises less and less."""

    def __post_init__(self) -> None:
        super().__post_init__()
        prefix = f"methods.{self.name}."
        one = (self.sparsity is None) != (self.perplexity is None)
        require(
            one, f"{prefix}sparsity", self.sparsity, "give either that or perplexity, a budget in percent"
        )
        ok = self.sparsity is None or 0 < self.sparsity < 1
        require(ok, f"{prefix}sparsity", self.sparsity, "it must be in (0, 1)")
        ok = self.perplexity is None or self.perplexity > 0
        require(ok, f"{prefix}perplexity", self.perplexity, "it must be a positive number of percent")
        ok = self.dense_perplexity is None or (self.dense_perplexity > 1 and self.perplexity is not None)
        mend = "it must be above 1, and only with perplexity"
        require(ok, f"{prefix}dense_perplexity", self.dense_perplexity, mend)
        require(0 <= self.start < self.by <= 1, f"{prefix}by", self.by, "it must be in (start, 1]")
        ok = self.lever in (None, *LEVERS)
        require(ok, f"{prefix}lever", self.lever, f"it is one of {', '.join(LEVERS)}")

    @property
    def beside(self) -> dict[str, str]:
        mend = 'it would take back the thresholds that were found: leave it out, or set lever="l1"'
        return {} if self.lever == "l1" else {"threshold_shift": mend}

    @property
    def steered_by_evaluations(self) -> bool:
        return self.perplexity is not None

    def check(self, sparsity: SparsityConfig | None) -> None:
        if sparsity is None:
            raise ValueError(
                "methods.target_sparsity is for patched models, and this is none (patch=none, the dense "
                "baseline; or not patched). Leave it out, or patch with relu or another activation."
            )
        if self.lever == "threshold" and (why := why_not(sparsity)):
            raise ValueError(
                f'methods.target_sparsity.lever="threshold" raises the thresholds of FATReLU and CATS, but '
                f'{why}; use lever="l1", or patch with relu.'
            )

    def attach(self, training: Training) -> Acting:
        by_threshold = self.lever == "threshold" or (self.lever is None and has_thresholds(training.model))
        goal = self._goal(training)
        return ByThreshold(training, goal) if by_threshold else ByPenalty(training, goal)

    def _goal(self, training: Training) -> Goal:
        steps = training.steps
        start, by = self.start * steps, self.by * steps
        if self.perplexity is None:
            assert self.sparsity is not None
            return Goal(steps, start, by, math.log(1 - self.sparsity))
        loss = training.dense_loss if self.dense_perplexity is None else math.log(self.dense_perplexity)
        if loss is None:
            raise ValueError(
                f"methods.target_sparsity.perplexity={self.perplexity} is relative to the dense model, which "
                "was not measured (sharded models are not, nor is one known that is patched already, or was "
                "given no dense_loss); give its perplexity as dense_perplexity."
            )
        if not 0 < training.eval_every <= (by - start) / _EVALUATIONS:
            raise ValueError(
                f"methods.target_sparsity.perplexity={self.perplexity} is steered by evaluations, and "
                f"eval_every={training.eval_every} gives fewer than {_EVALUATIONS} of them in the first "
                f"{self.by:.0%} of {steps} steps; set eval_every from 1 to "
                f"{max(1, int((by - start) / _EVALUATIONS))}."
            )
        budget = math.log1p(self.perplexity / 100)
        return Goal(steps, start, by, None, limit=loss + _MARGIN * budget, budget=budget)
