"""Activation sparsity while training: exact zeros in the forwards of the updates that are logged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from evaluation import bare_name
from torch import Tensor, nn

from hf_sparse.adapters import Block, require_blocks
from hf_sparse.adapters.experts import Experts


class TrainingSparsity:
    """Counts, in the forwards that it is told of, the exact zeros that reach the down projections.

    Give it the bare model before it is wrapped or sharded, and say whether it is ``compiled`` then: a hook
    that comes after torch.compile may never run, so its hooks stay. In others they come and go, and a block
    that is not watched may skip. They go over h once, which takes under 1 % of an update.
    """

    def __init__(self, model: nn.Module, *, compiled: bool) -> None:
        blocks, _ = require_blocks(model)
        self._counts = {bare_name(block.name): _Count(block, compiled) for block in blocks}
        self._seen: tuple[int, set[int]] = (-1, set())
        # The end of the forward comes before recomputation in backward, which must not count, and is to find
        # what the forward found: hooks that go do so before the next one.
        self._handles = [
            model.register_forward_pre_hook(self._start),
            model.register_forward_hook(self._end, always_call=True),
        ]

    def begin(self, step: int, part: int) -> None:
        """Count in the next forward, unless micro-batch ``part`` of update ``step`` had one already."""
        if step != self._seen[0]:
            self._seen = step, set()
            for count in self._counts.values():
                count.forget()
        if part not in self._seen[1]:
            self._seen[1].add(part)
            for count in self._counts.values():
                count.begin()

    def result(self, total: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """For the log: the share of zeros in the update last counted, in all blocks and by block.

        Args:
            total: the sum of a tensor over processes; all of them have to ask.

        """
        counted = torch.stack([count.counted.cpu() for count in self._counts.values()])
        zeros, values = total(counted).cpu().double().T
        shares = {name: float(share) for name, share in zip(self._counts, zeros / values, strict=True)}
        seen = {name: share for name, share in shares.items() if share == share}  # NaN: no token came by
        if not seen:
            return {}
        return {"sparsity": float(zeros.sum() / values.sum()), "layers": seen}

    def detach(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()
        for count in self._counts.values():
            count.detach()

    def _start(self, *_: Any) -> None:
        for count in self._counts.values():
            count.start()

    def _end(self, *_: Any) -> None:
        for count in self._counts.values():
            count.end()


class _Count:
    def __init__(self, block: Block, compiled: bool) -> None:
        self._block, self._on = block, False
        self.counted: Tensor
        """int64 [2]: zeros, and values."""
        self.forget()
        # Experts that are watched are computed once more, so theirs always come and go.
        self._stays = compiled and not isinstance(block.roles, Experts)
        self._handle = block.watch("h", self._count) if self._stays else None

    def forget(self) -> None:
        self.counted = torch.zeros(2, dtype=torch.int64)

    def begin(self) -> None:
        self._on = True
        if self._handle is None:
            self._handle = self._block.watch("h", self._count)

    def start(self) -> None:
        if not (self._on or self._stays):
            self.detach()

    def end(self) -> None:
        self._on = False

    def detach(self) -> None:
        if self._handle is not None:
            self._handle.remove()
        self._handle = None

    @torch.no_grad()
    def _count(self, h: Tensor, _: Tensor | None) -> None:
        if self._on:
            zeros = h.numel() - torch.count_nonzero(h, dim=-1).sum()
            self.counted = self.counted.to(h.device) + torch.stack([zeros, zeros.new_tensor(h.numel())])
