"""How far one method has to prune a model for what was asked."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pkgutil import iter_modules
from typing import TypeAlias

from transformers import PreTrainedModel

from hf_sparse.calibration import methods as _methods
from hf_sparse.calibration.method import Calibration
from hf_sparse.calibration.state import put
from hf_sparse.composite import LANGUAGE
from hf_sparse.config import SparsityConfig
from hf_sparse.observing import BlockObserver, Pass
from hf_sparse.patching import inspect

Run: TypeAlias = Callable[[Sequence[BlockObserver]], Pass]
"""One pass of the data through the model as it is."""

_HIGHEST = 0.99
_ROUNDS = 10
_CORRECTIONS = 5
_NEAR = 0.005
"""How far from the target a sparsity may be that is not corrected."""


def methods() -> tuple[str, ...]:
    """Their names, those of the files that they are in."""
    return tuple(sorted(one.name for one in iter_modules(_methods.__path__) if not one.name.startswith("_")))


def method_on(name: str, model: PreTrainedModel, start: SparsityConfig | None) -> Calibration:
    """The method ``name`` on ``model``, which is patched with ``start``, None if it is not.

    Raises:
        PatchError: it does not suit the model.

    """
    made: Calibration = import_module(f"{_methods.__name__}.{name}").Method(
        model, inspect(model, part=LANGUAGE).blocks, start
    )
    return made


@dataclass(frozen=True, kw_only=True)
class Aim:
    """One of the two."""

    sparsity: float | None
    increase: float | None
    """In percent of the perplexity, at most."""
    of_weights: bool = False
    """Whether the sparsity is a share of the weights of the layers' linear layers, not of what a method
    prunes."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """A level at which a method is at the aim; the model may be patched with another one meanwhile."""

    one: Calibration
    level: float
    sparsity: float
    dense: Pass
    """Without thresholds of the method."""
    after: Pass

    @property
    def unread(self) -> float:
        """The share of the weights of the layers' linear layers that a token does not need."""
        return self.sparsity * self.one.reach(self.dense.tokens)

    def apply(self) -> None:
        """Patch the model with it."""
        put(self.one.model, self.one.config(self.level))
        self.one.blocks = inspect(self.one.model, part=LANGUAGE).blocks
        self.one.settle(self.level)


class OutOfReach(ValueError):
    """A sparsity that a method does not have at any level."""

    def __init__(self, sparsity: float, low: float, high: float) -> None:
        self.sparsity, self.low, self.high = sparsity, low, high
        super().__init__(
            f"target_sparsity={sparsity} is above the {high:.1%} that this method and allocation reach; ask "
            "for less."
            if sparsity > high
            else f"target_sparsity={sparsity} is below the {low:.1%} that the model has without any "
            "threshold; ask for more."
        )


def search(one: Calibration, run: Run, aim: Aim) -> Found:
    """Where ``one`` is at ``aim``; leaves its model patched with one of the configs that were tried.

    Raises:
        OutOfReach: it has no level with that sparsity.
        PatchError: it does not suit the model.

    """
    base = one.model

    def loss(level: float) -> float:
        put(base, one.config(level))
        return run([]).loss

    def sparsity(level: float) -> tuple[float, Pass]:
        put(base, one.config(level))
        counters = one.counters(inspect(base, part=LANGUAGE).blocks)
        found = run(counters)
        return one.counted(counters), found

    put(base, one.base)
    dense = run(one.observers(inspect(base, part=LANGUAGE).blocks))
    wanted = aim.sparsity
    if wanted is not None and aim.of_weights:
        wanted /= one.reach(dense.tokens)
    one.finish(_HIGHEST if wanted is None else min(wanted, 1.0))
    if wanted is not None:
        level, reached, after = _corrected(one, sparsity, wanted)
    else:
        assert aim.increase is not None
        level = _level_within(loss, dense.loss + math.log1p(aim.increase / 100))
        reached, after = sparsity(level)
    return Found(one=one, level=level, sparsity=reached, dense=dense, after=after)


def _level_of(one: Calibration, sparsity: float) -> float:
    """Where ``sparsity`` is expected."""
    low, high = 0.0, 1.0
    least, most = one.expected(low), one.expected(high)
    if most < sparsity - 0.005 or least > sparsity + 0.005:
        raise OutOfReach(sparsity, least, most)
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if one.expected(middle) <= sparsity else (low, middle)
    return low


def _corrected(
    one: Calibration, measured: Callable[[float], tuple[float, Pass]], target: float
) -> tuple[float, float, Pass]:
    """The level of the measured sparsity nearest to ``target``, that sparsity, and the pass that found it."""
    wanted, found = target, []
    for _ in range(_CORRECTIONS):
        level = _level_of(one, wanted)
        found.append((level, *measured(level)))
        missed = target - found[-1][1]
        if abs(missed) <= _NEAR:
            break
        wanted = min(max(wanted + missed, one.expected(0.0)), one.expected(1.0))
    return min(found, key=lambda tried: abs(target - tried[1]))


def _level_within(loss: Callable[[float], float], allowed: float) -> float:
    """The highest level, to 0.1 %, whose loss is at most ``allowed``; the loss is taken to grow with it."""
    low, high = 0.0, _HIGHEST
    for _ in range(_ROUNDS):
        middle = (low + high) / 2
        low, high = (middle, high) if loss(middle) <= allowed else (low, middle)
    return low
