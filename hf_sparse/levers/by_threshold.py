"""The thresholds of FATReLU or CATS, raised to where a wanted share of the neurons is silent."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from hf_sparse.activations.cats import CLASSES
from hf_sparse.levers.goal import FLOOR, require_lever
from hf_sparse.levers.rising_threshold import RisingThreshold
from hf_sparse.methods.method import Acting, Training

if TYPE_CHECKING:
    from hf_sparse.config import SparsityConfig
    from hf_sparse.levers.goal import Goal
    from hf_sparse.metrics import SparsityReport


_HAVE = ("relu", "fatrelu", *CLASSES)
"""Activations that have a threshold, or get one."""
_DECIDE = ("topk", "statistical_topk", "inputs")
"""Parts of a config that make zeros of their own."""


def why_not(sparsity: SparsityConfig) -> str:
    """Why thresholds alone do not decide which neurons of a model are silent; empty if they do."""
    found = sparsity.activation.name
    if found not in _HAVE:
        return f"patch={found}"
    return next((f"there is {name}" for name in _DECIDE if name in sparsity.parts), "")


def has_thresholds(model: nn.Module) -> bool:
    """Whether thresholds alone can silence the neurons of all that is patched in ``model``."""
    from hf_sparse.patching import inspect

    first = inspect(model)
    configs = [one.config for one in (first, *first.others) if one.config is not None]
    return bool(configs) and not any(map(why_not, configs))


class ByThreshold(Acting):
    """The thresholds of the activation rise; ReLU becomes FATReLU with the first update.

    Raises:
        ValueError: thresholds alone cannot; see :func:`has_thresholds`.

    """

    def __init__(self, training: Training, goal: Goal) -> None:
        if not has_thresholds(training.model):
            raise ValueError(
                'methods.target_sparsity.lever="threshold" is for models that are patched with relu, fatrelu '
                'or cats and nothing else that makes zeros, in all of their parts; use lever="l1".'
            )
        self._goal = goal
        self._rising = RisingThreshold(training.model, training.mean)
        self._begin: tuple[float, float] | None = None  # of the ramp: updates, and ln of the density
        self._wanted: float | None = None  # ln of the density
        self._slack: float | None = None  # nats below the limit, at the last evaluation

    def before_step(self, step: int) -> None:
        self._rising.begin(step > self._goal.start)

    def before_perturbed(self, step: int) -> None:
        self._rising.pause()

    def after_step(self, step: int) -> None:
        def wanted(*sparsities: float) -> float:
            return 1 - math.exp(self._want(step, *(math.log(max(1 - one, FLOOR)) for one in sparsities)))

        self._rising.move(wanted)

    def after_evaluation(self, step: int, report: SparsityReport) -> None:
        self._rising.tell()
        if self._goal.limit is not None:
            self._slack = self._goal.limit - report.loss

    def finish(self) -> None:
        self._rising.tell()
        self._goal.tell_if_missed(self._rising.sparsity, "it needs more updates after it began to rise")
        if not any(self._rising.thresholds):
            self._goal.tell_if_more(self._rising.sparsity)

    def values(self) -> dict[str, float]:
        thresholds, sparsity = self._rising.thresholds, self._rising.sparsity
        wanted = {} if self._wanted is None else {"wanted_sparsity": 1 - math.exp(self._wanted)}
        found = {} if sparsity is None else {"training_sparsity": sparsity}
        return {"target_threshold": sum(thresholds) / len(thresholds), **found, **wanted}

    def state_dict(self) -> dict[str, Any]:
        self._rising.tell()  # whoever keeps the state keeps the model, perhaps without save_pretrained
        return {
            "lever": "threshold",
            "thresholds": list(self._rising.thresholds),
            "sparsity": self._rising.sparsity,
            "begin": None if self._begin is None else list(self._begin),
            "wanted": self._wanted,
            "slack": self._slack,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        require_lever(state, "threshold")
        thresholds = list(state["thresholds"])
        if len(thresholds) != len(self._rising.thresholds):
            raise ValueError(
                f"the state of target_sparsity has {len(thresholds)} thresholds, and the model "
                f"{len(self._rising.thresholds)} patched blocks; patch it as it was, or begin anew."
            )
        self._begin = None if state["begin"] is None else tuple(state["begin"])
        self._wanted, self._slack = state["wanted"], state["slack"]
        self._rising.thresholds, self._rising.sparsity = thresholds, state["sparsity"]
        self._rising.apply()
        self._rising.tell()

    def detach(self) -> None:
        self._rising.remove()

    def _want(self, step: int, natural: float, now: float) -> float:
        """What is wanted now, as ln of the density, from those without thresholds and with these."""
        if self._goal.limit is None:
            if self._begin is None:
                self._begin = max(self._goal.start, step - 1.0), now
            self._wanted = self._goal.ramp(step, *self._begin)
        elif self._slack is not None:
            wanted = now if self._wanted is None else self._wanted
            self._wanted = wanted + self._goal.change(step, self._slack)
        else:
            return now
        self._wanted = min(self._wanted, natural)
        return self._wanted
