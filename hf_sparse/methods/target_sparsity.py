"""The user states a sparsity, or what it may cost in perplexity; the coefficient of L1 is found."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_sparse.activations import MixedActivation
from hf_sparse.control import DensityControl
from hf_sparse.fields import require
from hf_sparse.forwards import Forwards
from hf_sparse.methods.method import Acting, Method, Term, Training
from hf_sparse.objectives import L1Penalty

if TYPE_CHECKING:
    from hf_sparse.config import SparsityConfig
    from hf_sparse.metrics import SparsityReport

_EVALUATIONS = 4
"""As many at least to find out what sparsity costs."""
_SEARCH = 0.4
"""The share of the time in which a model that does not answer to a penalty is waited for."""
_RANGE = 3.0
"""In ln(density), from a half to a fortieth: what a budget is offered in the time that there is."""
_FASTEST = 0.004
"""In ln(density) per update: what sparsity costs shows some dozens of updates later."""
_LEAD = 0.2
"""In ln(density), to the density that there is."""
_STEP = 1.0
"""In ln(coefficient) per evaluation: how fast it is searched for, and falls while a budget is overdrawn."""
_MARGIN = 0.9
"""The share of a budget that is aimed at."""
_MISSED = 0.01
"""In sparsity, below the target: what is said to have missed it."""
_LAST = 0.2
"""The share of the run in the end in which sparsity is raised less and less, so that a budget is kept."""


@dataclass(frozen=True, kw_only=True)
class TargetSparsity(Method):
    """L1 whose coefficient is controlled: by a sparsity to be reached, or by a budget in perplexity.

    Ours; see :class:`~hf_sparse.control.DensityControl`. Sparsity is the share of exact zeros that reach the
    down projections in training forwards, over tokens, neurons and layers.
    """

    name = "target_sparsity"
    excludes = ("l1",)

    sparsity: float | None = None
    """Share of exact zeros to be reached, below 1."""

    perplexity: float | None = None
    """Instead: raise sparsity as long as the held-out perplexity is at most so many percent above that of the
    dense model. Evaluations steer it, so eval_every is a part of what is learned."""

    dense_perplexity: float | None = None
    """What that of the dense model is; none: of the model before the patch, as the run measures it. One that
    was finetuned on the same tokens is the fairer one."""

    start: float = 0.0
    """Fraction of the run trained without a penalty at first."""

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

    @property
    def steered_by_evaluations(self) -> bool:
        return self.perplexity is not None

    def check(self, sparsity: SparsityConfig | None) -> None:
        if sparsity is None:
            raise ValueError(
                "methods.target_sparsity has no meaning with patch=none, the dense baseline: its activations "
                "are never exactly zero. Leave it out, or choose an activation."
            )

    def attach(self, training: Training) -> Acting:
        horizon = (self.by - self.start) * training.steps
        if self.perplexity is None:
            return _Acting(self, training, None)
        loss = training.dense_loss if self.dense_perplexity is None else math.log(self.dense_perplexity)
        if loss is None:
            raise ValueError(
                f"methods.target_sparsity.perplexity={self.perplexity} is relative to the dense model, which "
                "was not measured (sharded models are not); give its perplexity as dense_perplexity."
            )
        if not 0 < training.eval_every <= horizon / _EVALUATIONS:
            raise ValueError(
                f"methods.target_sparsity.perplexity={self.perplexity} is steered by evaluations, and "
                f"eval_every={training.eval_every} gives fewer than {_EVALUATIONS} of them in the first "
                f"{self.by:.0%} of {training.steps} steps; set eval_every from 1 to "
                f"{max(1, int(horizon / _EVALUATIONS))}."
            )
        return _Acting(self, training, loss + _MARGIN * math.log1p(self.perplexity / 100))


class _Acting(Acting):
    def __init__(self, method: TargetSparsity, training: Training, limit: float | None) -> None:
        self._method, self._training, self._limit = method, training, limit
        self._penalty = L1Penalty(training.model)
        self._forwards = Forwards(training.model, "h", self._count)
        self._start, self._by = method.start * training.steps, method.by * training.steps
        # What a budget could not afford it may again: from nearly nothing that would take too long.
        least = 1e-6 if limit is None else 1e-2
        self._control = DensityControl(max(1.0, self._by - self._start), least)
        self._wanted: float | None = None  # ln of the density; None while the coefficient is searched for
        self._begin = (0.0, 0.0)  # of the ramp: step, and ln of the density
        self._slack: float | None = None  # nats below the limit, at the last evaluation
        self._coefficient = self._sparsity = 0.0
        self._on = False
        self._zeros: list[Tensor] = []
        self._values: list[Tensor] = []
        self._entries = 0
        self._penalties: list[tuple[Tensor, int]] = []

    def before_step(self, step: int) -> None:
        self._zeros, self._values, self._entries, self._penalties = [], [], 0, []
        # While activations are mixed nothing is exactly zero, and nothing is to be learned from that.
        mixed = any(isinstance(block.activation, MixedActivation) for block in self._forwards.blocks)
        self._on = step > self._start and not mixed
        self._coefficient = self._control.coefficient if self._on else 0.0

    def loss(self, step: int, batch: Mapping[str, Tensor], output: Any) -> dict[str, Term]:
        penalty = self._penalty.value()
        rows = next(len(value) for value in batch.values() if isinstance(value, Tensor) and value.dim() > 1)
        self._penalties.append((penalty.detach(), rows))
        return {"target_l1": Term(penalty, self._coefficient)}

    def after_step(self, step: int) -> None:
        if not (self._on and self._zeros):
            return
        device = self._zeros[0].device
        zeros, counted = (
            torch.stack([one.to(device) for one in found]).sum().float() if found else torch.tensor(0.0)
            for found in (self._zeros, self._values)
        )
        penalty = sum(value * n for value, n in self._penalties) / sum(n for _, n in self._penalties)
        found = torch.stack([zeros, counted.to(device) + self._entries, torch.as_tensor(penalty).to(device)])
        silent, entries, mean = self._training.mean(found).tolist()
        self._sparsity = silent / max(entries, 1.0)
        density = self._control.see(self._sparsity, mean)
        if self._limit is None:
            self._follow_ramp(step, density)
        else:
            self._spend(step, density)

    def after_evaluation(self, step: int, report: SparsityReport) -> None:
        if self._limit is not None:
            self._slack = self._limit - report.loss

    def finish(self) -> None:
        goal, density = self._method.sparsity, self._control.density
        if goal is None or density is None:
            return
        if (found := 1 - math.exp(density)) < goal - _MISSED:
            warnings.warn(
                f"methods.target_sparsity.sparsity={goal:g} was not reached: it is {found:.3f} in the end, "
                f"at a coefficient of {self._coefficient:.3g}. An update moves weights as far as its "
                "learning rate lets it, however large the penalty; give more updates, or a larger rate.",
                stacklevel=2,
            )

    def values(self) -> dict[str, float]:
        wanted = {} if self._wanted is None else {"wanted_sparsity": 1 - math.exp(self._wanted)}
        return {"target_coefficient": self._coefficient, "training_sparsity": self._sparsity, **wanted}

    def state_dict(self) -> dict[str, Any]:
        return {
            "control": self._control.state_dict(),
            "wanted": self._wanted,
            "begin": list(self._begin),
            "slack": self._slack,
            "sparsity": self._sparsity,
            "coefficient": self._coefficient,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._control.load_state_dict(state["control"])
        step, density = state["begin"]
        self._begin = step, density
        self._wanted, self._slack = state["wanted"], state["slack"]
        self._sparsity, self._coefficient = state["sparsity"], state["coefficient"]

    def detach(self) -> None:
        self._forwards.remove()
        self._penalty.remove()

    def _count(self, _: int, h: Tensor, text: Tensor | None) -> None:
        if not (self._on and self._forwards.running and torch.is_grad_enabled()):
            return
        if text is None:
            self._zeros.append(h.numel() - torch.count_nonzero(h))
            self._entries += h.numel()
        else:
            self._zeros.append(((h.flatten(0, -2) == 0).sum(-1) * text).sum())
            self._values.append(text.sum() * h.shape[-1])

    def _follow_ramp(self, step: int, density: float) -> None:
        assert self._method.sparsity is not None
        goal = math.log(1 - self._method.sparsity)
        if self._wanted is None:
            late = step - self._start > _SEARCH * (self._by - self._start)
            if density > goal and not self._control.search() and not late:
                return
            self._begin = float(step), density
        begin, first = self._begin
        passed = (step - begin) / (self._by - begin) if self._by > begin else 1.0
        self._wanted = first + (goal - first) * min(max(passed, 0.0), 1.0)
        self._control.follow(self._wanted)

    def _spend(self, step: int, density: float) -> None:
        if self._slack is None:
            return
        assert self._method.perplexity is not None
        control, steps = self._control, self._training.steps
        if self._wanted is None:
            if self._slack <= 0 and not control.searching:
                return  # there has been nothing to spend so far
            if self._slack > 0 and not control.search(_STEP / self._training.eval_every):
                return
            self._wanted = density
        # Sparser the faster the more of the budget is left; in the end only back.
        share = min(self._slack / math.log1p(self._method.perplexity / 100), 1.0) if self._slack > 0 else -2.0
        left = min(max((steps - step) / (_LAST * steps), 0.0), 1.0)
        pace = min(_RANGE / (self._by - self._start), _FASTEST)
        wanted = self._wanted - pace * (share * left if share > 0 else share)
        # What the model does not follow is not asked for.
        self._wanted = min(max(wanted, density - _LEAD * left), density + _LEAD, 0.0)
        control.follow(self._wanted)
        if share < 0:  # it is the push that costs most
            control.move(-_STEP / self._training.eval_every)
