"""The thresholds of FATReLU or CATS, raised to where a wanted share of the neurons is silent."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from hf_sparse.activations import CATS, ActivationConfig, FATReLU, MixedActivation
from hf_sparse.activations.cats import CLASSES
from hf_sparse.adapters import require_blocks
from hf_sparse.levers.rising_threshold import RisingThreshold, plain
from hf_sparse.methods.method import Acting, Training

if TYPE_CHECKING:
    from hf_sparse.config import SparsityConfig
    from hf_sparse.levers.goal import Goal
    from hf_sparse.metrics import SparsityReport

_FLOOR = 1e-6


_HAVE = ("relu", "fatrelu", *CLASSES)
_SELECTIONS = ("topk", "statistical_topk")


def why_not(sparsity: SparsityConfig) -> str:
    """Why thresholds alone do not decide which neurons of a model are silent; empty if they do."""
    found = sparsity.activation.name
    if found not in _HAVE:
        return f"patch={found}"
    return next((f"there is {name}" for name in _SELECTIONS if name in sparsity.parts), "")


def has_thresholds(model: nn.Module) -> bool:
    """Whether thresholds alone can silence the neurons of all that is patched in ``model``."""
    from hf_sparse.patching import inspect

    first = inspect(model)
    configs = [one.config for one in (first, *first.others) if one.config is not None]
    return bool(configs) and not any(map(why_not, configs))


class ByThreshold(Acting):
    """The thresholds of the activation rise; ReLU becomes FATReLU. Of models that :func:`has_thresholds`."""

    def __init__(self, training: Training, goal: Goal) -> None:
        self._training, self._goal = training, goal
        self._made: RisingThreshold | None = None  # by the first update: until then the model is as it was
        self._first: float | None = None  # ln of the density that the ramp begins with
        self._wanted: float | None = None  # ln of the density
        self._slack: float | None = None  # nats below the limit, at the last evaluation

    def before_step(self, step: int) -> None:
        self._thresholds.begin(step > self._goal.start)

    def before_perturbed(self, step: int) -> None:
        self._thresholds.pause()

    def after_step(self, step: int) -> None:
        def wanted(natural: float) -> float:
            return 1 - math.exp(self._want(step, math.log(max(1 - natural, _FLOOR))))

        self._thresholds.move(wanted)

    def after_evaluation(self, step: int, report: SparsityReport) -> None:
        if self._goal.limit is not None:
            self._slack = self._goal.limit - report.loss

    def values(self) -> dict[str, float]:
        if self._made is None:
            return {}
        thresholds, sparsity = self._made.thresholds, self._made.sparsity
        wanted = {} if self._wanted is None else {"wanted_sparsity": 1 - math.exp(self._wanted)}
        mean = sum(thresholds) / len(thresholds)
        return {"target_threshold": mean, "training_sparsity": sparsity, **wanted}

    def state_dict(self) -> dict[str, Any]:
        if self._made is None:
            return {}
        return {
            "thresholds": list(self._made.thresholds),
            "sparsity": self._made.sparsity,
            "first": self._first,
            "wanted": self._wanted,
            "slack": self._slack,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._first, self._wanted, self._slack = state["first"], state["wanted"], state["slack"]
        self._thresholds.thresholds = list(state["thresholds"])
        self._thresholds.sparsity = state["sparsity"]
        self._thresholds.apply()

    def detach(self) -> None:
        if self._made is not None:
            self._made.remove()

    @property
    def _thresholds(self) -> RisingThreshold:
        if self._made is None:
            from hf_sparse.patching import set_activation

            model = self._training.model
            patched = [block for block in require_blocks(model)[0] if block.is_patched]
            act = patched[0].activation
            if not isinstance(plain(patched[0]), FATReLU | CATS):
                mix = act.k if isinstance(act, MixedActivation) else 1.0
                set_activation(model, ActivationConfig(name="fatrelu", mix=mix))
            self._made = RisingThreshold(model, self._training.mean)
        return self._made

    def _want(self, step: int, natural: float) -> float:
        """What is wanted now, as ln of the density, which is at most that without thresholds."""
        if self._goal.limit is None:
            self._first = natural if self._first is None else self._first
            self._wanted = self._goal.ramp(step, self._goal.start, self._first)
        elif self._slack is not None:
            wanted = natural if self._wanted is None else self._wanted
            self._wanted = wanted + self._goal.change(step, self._slack)
        else:
            return natural
        self._wanted = min(self._wanted, natural)
        return self._wanted
