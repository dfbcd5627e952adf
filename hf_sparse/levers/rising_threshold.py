"""Thresholds of activations that rise, block by block, to where a stated share of the neurons is silent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hf_sparse.activations import CATS, ActivationConfig, FATReLU, MixedActivation
from hf_sparse.calibration.magnitudes import BUCKETS, INFINITE, Magnitudes, counted
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
    """One for each patched block, in the unit of the activation's own."""
    sparsity: float | None = None
    """The share of silent neurons in the update last seen, over patched blocks; None before the first."""

    def __init__(self, model: nn.Module, mean: Callable[[Tensor], Tensor]) -> None:
        self._model, self._mean = model, mean
        self._device = next(model.parameters()).device
        self._watch()
        self.thresholds = [float(getattr(plain(block), "threshold", 0.0)) for block in self._blocks]
        self._on = self._counting = False

    def begin(self, on: bool) -> None:
        """Forget what was counted; count in the forwards that come, if ``on`` and nothing is mixed."""
        self._require_thresholds()
        now = [block.activation for block in self._blocks]
        if any(one is not watched for one, watched in zip(now, self._watched, strict=True)):
            self._forwards.remove()
            self._watch()
        self._on = on and not any(isinstance(one, MixedActivation) for one in now)
        self._counting = self._on
        self._seen: dict[int, Tensor] = {}
        self._there: dict[int, Tensor] = {}

    def pause(self) -> None:
        """Count no more, until the next :meth:`begin`."""
        self._counting = False

    def move(self, wanted: Callable[[float, float], float]) -> None:
        """Set thresholds for a sparsity, unless counting is off.

        Args:
            wanted: gets the sparsity that there would be without thresholds, and that which there is, and
                returns what is to be.

        Raises:
            RuntimeError: there was nothing to count.

        """
        if not self._on:
            return
        # Each process asks, also one whose experts got no token.
        device = next((one.device for one in self._seen.values()), self._device)
        none = torch.zeros(BUCKETS), torch.zeros(())
        found = [
            torch.cat([own.to(device).float().reshape(-1) for own in self._found(i, none)])
            for i in range(len(self._blocks))
        ]
        *counts, there = self._mean(torch.stack(found)).T.split([BUCKETS, 1])
        seen = [_magnitudes(one) for one in counts[0].T]
        there = [float(n) if one.total else 0.0 for n, one in zip(there[0], seen, strict=True)]
        if not any(there):
            raise RuntimeError(
                "target_sparsity saw no forward of the model with gradient in this update, so it knows no "
                "sparsity. With gradient checkpointing use "
                "activation_checkpointing_kwargs={'use_reentrant': False}."
            )
        at = [one.at_most(0.0) if one.total else 0.0 for one in seen]
        now = [one.at_most(t) if one.total else 0.0 for one, t in zip(seen, self.thresholds, strict=True)]
        self.sparsity = _mean_of(now, there)
        level = _level(wanted(_mean_of(at, there), self.sparsity), at, there)
        for i, one in enumerate(seen):
            if one.total:
                self.thresholds[i] += _SMOOTHING * (one.quantile(level) - self.thresholds[i])
        self.apply()

    def apply(self) -> None:
        """Give the blocks of the model their thresholds."""
        self._require_thresholds()
        for block, threshold in zip(self._blocks, self.thresholds, strict=True):
            for copy in (block, *block.spares):
                _own(copy).threshold = threshold

    def tell(self) -> None:
        """Let the config of the model say what the thresholds are now."""
        from hf_sparse.patching import update_config

        update_config(self._model)

    def remove(self) -> None:
        """Take the hooks off the model; thresholds stay."""
        self._forwards.remove()

    def _require_thresholds(self) -> None:
        """Make FATReLU with a threshold of 0, which is the same function, of ReLU."""
        if all(isinstance(plain(block), FATReLU | CATS) for block in self._blocks):
            return
        from hf_sparse.patching import inspect, set_activation

        first = inspect(self._model)
        for one in (first, *first.others):
            if one.config is not None and (old := one.config.activation).name == "relu":
                set_activation(self._model, ActivationConfig(name="fatrelu", mix=old.mix), part=one.part)

    def _watch(self) -> None:
        self._forwards = Forwards(self._model, "p", self._count, only=lambda block: block.is_patched)
        self._blocks = self._forwards.blocks
        self._watched = [block.activation for block in self._blocks]

    def _found(self, index: int, none: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return (self._seen[index], self._there[index]) if index in self._seen else none

    def _count(self, index: int, p: Tensor, text: Tensor | None) -> None:
        if not (self._counting and self._forwards.running and torch.is_grad_enabled()):
            return
        p, width = p.detach(), p.shape[-1]
        some, which = self._some(p), text
        if text is not None:
            which = text[some] if p.dim() < 3 else text.view(p.shape[:-1])[..., some]
        weights = None if which is None else which.long()[..., None].expand(*which.shape, width)
        counts = counted(_own(self._blocks[index]).compared(p[..., some, :]), weights)
        # Infinite values and NaN have no place among quantiles.
        counts[INFINITE:] = 0
        there = counts.new_tensor(p.numel()) if text is None else text.sum() * width
        if index in self._seen:
            counts, there = self._seen[index] + counts, self._there[index] + there
        self._seen[index], self._there[index] = counts, there

    def _some(self, p: Tensor) -> slice | Tensor:
        """The tokens that are counted: by their places in a sequence, not by how an update is cut."""
        forwards, rows = self._forwards, p.shape[-2]
        length = rows if p.dim() > 2 else forwards.length or 1
        step = max(1, -(-length * p.shape[-1] // _MOST))
        if p.dim() > 2 or step == 1:
            return slice(step // 2, None, step)
        tokens = torch.arange(rows, device=p.device) if forwards.rows is None else forwards.rows
        return tokens % length % step == step // 2


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


def _mean_of(shares: Sequence[float], totals: Sequence[float]) -> float:
    return sum(share * n for share, n in zip(shares, totals, strict=True)) / sum(totals)


def _level(wanted: float, natural: Sequence[float], totals: Sequence[float]) -> float:
    """The level at which blocks that have at least ``natural`` zeros have ``wanted`` of them together."""
    low, high = 0.0, 1.0
    while high - low > 1e-6:
        level = (low + high) / 2
        found = _mean_of([max(level, one) for one in natural], totals)
        low, high = (level, high) if found < wanted else (low, level)
    return low
