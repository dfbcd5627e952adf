"""Thresholds of activations that rise, block by block, to where a stated share of the neurons is silent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hf_sparse.activations import CATS, FATReLU, MixedActivation
from hf_sparse.calibration.magnitudes import BUCKETS, Magnitudes, counted
from hf_sparse.forwards import Forwards

if TYPE_CHECKING:
    from hf_sparse.adapters import Block

_MOST = 2**19
"""Values of one sequence and block that are counted: of more, every so many tokens."""
_SMOOTHING = 0.3
_FRACTIONS = 2**10
"""Means over processes are counted in parts of one."""


class RisingThreshold:
    """The thresholds of a model with FATReLU or CATS, moved after each update.

    The threshold of a block is the quantile, at one level for all blocks, of the values that it is compared
    with, among tokens of the update that was; a block that has more zeros without one keeps 0. The level
    is such that the share of silent neurons over all blocks is the wanted one. Smoothed over about three
    updates. That is what :func:`hf_sparse.calibrate` does once, with ``method="fatrelu"`` and ``"cats"``.

    Give it the bare model before it is wrapped or sharded. All processes have to call :meth:`move`.
    """

    thresholds: list[float]
    """One for each block, in the unit of the activation's own."""
    sparsity: float = 0.0
    """The share of silent neurons, in the update last seen."""

    def __init__(self, model: nn.Module, mean: Callable[[Tensor], Tensor]) -> None:
        self._model, self._mean = model, mean
        self._watch()
        self.thresholds = [_own(block).threshold for block in self._blocks.values()]
        self.begin(False)

    def begin(self, on: bool) -> None:
        """Forget what was counted; count in the forwards that come, if ``on`` and nothing is mixed."""
        now = [block.activation for block in self._blocks.values()]
        if any(one is not watched for one, watched in zip(now, self._watched, strict=True)):
            self._forwards.remove()
            self._watch()
        self._on = on and not any(isinstance(one, MixedActivation) for one in now)
        self._counting = self._on
        self._seen: dict[int, Tensor] = {}

    def pause(self) -> None:
        """Count no more, until the next :meth:`begin`."""
        self._counting = False

    def move(self, wanted: Callable[[float], float]) -> bool:
        """Set thresholds for a sparsity; returns whether there was anything to count.

        Args:
            wanted: gets the sparsity that there would be without thresholds, and returns what is to be.

        """
        if not self._on:
            return False
        # Each process asks, also one whose experts got no token.
        device = next((one.device for one in self._seen.values()), torch.device("cpu"))
        none = torch.zeros(BUCKETS)
        counts = torch.stack([self._seen.get(i, none).to(device).float() for i in self._blocks])
        seen = [_magnitudes(one) for one in self._mean(counts)]
        totals = [one.total for one in seen]
        if not any(totals):
            return False
        at = [one.at_most(0.0) if one.total else 0.0 for one in seen]
        now = [one.at_most(t) if one.total else 0.0 for one, t in zip(seen, self.thresholds, strict=True)]
        self.sparsity = _mean_of(now, totals)
        level = _level(wanted(_mean_of(at, totals)), at, totals)
        for i, one in enumerate(seen):
            if one.total:
                self.thresholds[i] += _SMOOTHING * (one.quantile(level) - self.thresholds[i])
        self.apply()
        return True

    def apply(self) -> None:
        """Give the blocks of the model their thresholds."""
        for block, threshold in zip(self._blocks.values(), self.thresholds, strict=True):
            for copy in (block, *block.spares):
                _own(copy).threshold = threshold

    def remove(self) -> None:
        """Take the hooks off the model; thresholds stay."""
        self._forwards.remove()

    def _watch(self) -> None:
        self._forwards = Forwards(self._model, "p", self._count)
        found = enumerate(self._forwards.blocks)
        self._blocks = {i: block for i, block in found if block.is_patched}
        self._watched = [block.activation for block in self._blocks.values()]

    def _count(self, index: int, p: Tensor, text: Tensor | None) -> None:
        counting = self._counting and self._forwards.running and torch.is_grad_enabled()
        if not counting or index not in self._blocks:
            return
        # Which tokens depends on their places alone, and not on how an update is cut into batches.
        step = -(-p.shape[-2:].numel() // _MOST)
        some = slice(step // 2, None, step)
        weights = None
        if text is not None:
            rows = text.view(p.shape[:-1])[..., some, None]
            weights = rows.long().expand(*rows.shape[:-1], p.shape[-1])
        counts = counted(_own(self._blocks[index]).compared(p.detach()[..., some, :]), weights)
        self._seen[index] = self._seen[index] + counts if index in self._seen else counts


def plain(block: Block) -> nn.Module:
    """The activation of a block, without what is mixed into it."""
    act = block.activation
    return act.new if isinstance(act, MixedActivation) else act


def _own(block: Block) -> FATReLU | CATS:
    act = plain(block)
    assert isinstance(act, FATReLU | CATS)
    return act


def _magnitudes(counts: Tensor) -> Magnitudes:
    found = Magnitudes()
    found.add((counts.double() * _FRACTIONS).round().long())
    return found


def _mean_of(shares: Sequence[float], totals: Sequence[int]) -> float:
    return sum(share * n for share, n in zip(shares, totals, strict=True)) / sum(totals)


def _level(wanted: float, natural: Sequence[float], totals: Sequence[int]) -> float:
    """The level at which blocks that have at least ``natural`` zeros have ``wanted`` of them together."""
    low, high = 0.0, 1.0
    while high - low > 1e-6:
        level = (low + high) / 2
        found = _mean_of([max(level, one) for one in natural], totals)
        low, high = (level, high) if found < wanted else (low, level)
    return low
