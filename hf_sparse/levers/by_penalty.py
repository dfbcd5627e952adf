"""An L1 penalty whose coefficient is found."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_sparse.activations import MixedActivation
from hf_sparse.forwards import Forwards, patched_or_all
from hf_sparse.levers.by_threshold import has_thresholds
from hf_sparse.levers.control import DensityControl
from hf_sparse.levers.goal import require_lever
from hf_sparse.methods.method import Acting, Term, Training
from hf_sparse.objectives import L1Penalty

if TYPE_CHECKING:
    from hf_sparse.levers.goal import Goal
    from hf_sparse.metrics import SparsityReport

_SEARCH = 0.4
"""The share of the time in which a model that does not answer to a penalty is waited for."""
_LEAD = 0.2
"""In ln(density), to the density that there is."""
_STEP = 1.0
"""In ln(coefficient) per evaluation: how fast it is searched for, and falls while a budget is overdrawn."""


class ByPenalty(Acting):
    """The coefficient of an L1 penalty is controlled; the activation stays as it is."""

    def __init__(self, training: Training, goal: Goal) -> None:
        self._training, self._goal = training, goal
        self._penalty = L1Penalty(training.model)
        only = patched_or_all(training.model)
        self._forwards = Forwards(training.model, "h", self._count, only=only)
        # What a budget could not afford it may again: from nearly nothing that would take too long.
        least = 1e-6 if goal.limit is None else 1e-2
        self._control = DensityControl(max(1.0, goal.by - goal.start), least)
        self._wanted: float | None = None  # ln of the density; None while the coefficient is searched for
        self._begin = (0.0, 0.0)  # of the ramp: step, and ln of the density
        self._slack: float | None = None  # nats below the limit, at the last evaluation
        self._coefficient = self._sparsity = 0.0
        self._on = self._counting = False
        self._zeros: list[Tensor] = []
        self._values: list[Tensor] = []
        self._entries = 0
        self._penalties: list[tuple[Tensor, int]] = []

    def before_step(self, step: int) -> None:
        self._zeros, self._values, self._entries, self._penalties = [], [], 0, []
        # While activations are mixed nothing is exactly zero, and nothing is to be learned from that.
        mixed = any(isinstance(block.activation, MixedActivation) for block in self._forwards.blocks)
        self._on = step > self._goal.start and not mixed
        self._counting = self._on
        self._coefficient = self._control.coefficient if self._on else 0.0

    def before_perturbed(self, step: int) -> None:
        self._counting = False

    def loss(self, step: int, batch: Mapping[str, Tensor], output: Any) -> dict[str, Term]:
        penalty = self._penalty.value()
        rows = next(len(value) for value in batch.values() if isinstance(value, Tensor) and value.dim() > 1)
        if self._counting:
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
        if self._goal.limit is None:
            self._follow_ramp(step, density)
        else:
            self._spend(step, density)

    def after_evaluation(self, step: int, report: SparsityReport) -> None:
        if self._goal.limit is not None:
            self._slack = self._goal.limit - report.loss

    def finish(self) -> None:
        density = self._control.density
        other = ', or lever="threshold"' if has_thresholds(self._training.model) else ""
        self._goal.tell_if_missed(
            None if density is None else 1 - math.exp(density),
            f"the coefficient was {self._coefficient:.3g}. An update moves weights as far as its learning "
            f"rate lets it, however large the penalty; give more updates or a larger rate{other}",
        )

    def values(self) -> dict[str, float]:
        wanted = {} if self._wanted is None else {"wanted_sparsity": 1 - math.exp(self._wanted)}
        return {"target_coefficient": self._coefficient, "training_sparsity": self._sparsity, **wanted}

    def state_dict(self) -> dict[str, Any]:
        return {
            "lever": "l1",
            "control": self._control.state_dict(),
            "wanted": self._wanted,
            "begin": list(self._begin),
            "slack": self._slack,
            "sparsity": self._sparsity,
            "coefficient": self._coefficient,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if "control" not in state or "lever" in state:  # that of an older version has no name
            require_lever(state, "l1")
        self._control.load_state_dict(state["control"])
        step, density = state["begin"]
        self._begin = step, density
        self._wanted, self._slack = state["wanted"], state["slack"]
        self._sparsity, self._coefficient = state["sparsity"], state["coefficient"]

    def detach(self) -> None:
        self._forwards.remove()
        self._penalty.remove()

    def _count(self, _: int, h: Tensor, text: Tensor | None) -> None:
        if not (self._counting and self._forwards.running and torch.is_grad_enabled()):
            return
        if text is None:
            self._zeros.append(h.numel() - torch.count_nonzero(h))
            self._entries += h.numel()
        else:
            self._zeros.append(((h.flatten(0, -2) == 0).sum(-1) * text).sum())
            self._values.append(text.sum() * h.shape[-1])

    def _follow_ramp(self, step: int, density: float) -> None:
        goal = self._goal
        assert goal.density is not None
        if self._wanted is None:
            late = step - goal.start > _SEARCH * (goal.by - goal.start)
            if density > goal.density and not self._control.search() and not late:
                return
            self._begin = float(step), density
        self._wanted = goal.ramp(step, *self._begin)
        self._control.follow(self._wanted)

    def _spend(self, step: int, density: float) -> None:
        if self._slack is None:
            return
        control, left = self._control, self._goal.left(step)
        if self._wanted is None:
            if self._slack <= 0 and not control.searching:
                return  # there has been nothing to spend so far
            if self._slack > 0 and not control.search(_STEP / self._training.eval_every):
                return
            self._wanted = density
        wanted = self._wanted + self._goal.change(step, self._slack)
        # What the model does not follow is not asked for.
        self._wanted = min(max(wanted, density - _LEAD * left), density + _LEAD, 0.0)
        control.follow(self._wanted)
        if self._slack <= 0:  # it is the push that costs most
            control.move(-_STEP / self._training.eval_every)
