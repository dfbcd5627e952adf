"""Density of the union over several tokens: what a kernel that takes them at once has to read.

Of consecutive tokens, as in a prompt or in speculative decoding: "aggregated sparsity" of arXiv 2310.04564,
"chunk-level sparsity" of arXiv 2507.08771. Of sequences at the same position: a batch that is decoded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_sparse.adapters import Block
from hf_sparse.metrics.metric import LayerMetric, Metric

CHUNKS = (1, 2, 4, 8, 16, 32)
"""Consecutive tokens of one sequence; each is twice the one before."""
BATCHES = (1, 2, 4, 8)
"""Sequences of a batch; each is twice the one before."""


@dataclass(frozen=True, kw_only=True)
class LayerUnion(LayerMetric):
    """The neurons of one block that are active for at least one token of a group.

    Groups do not overlap. Chunks of n begin with the first token of a sequence; groups of n sequences, with
    the first of a batch, and have a member in each at every position that all of them have, counted from
    their first tokens. What is left over, too few for a group, is in none.
    """

    chunks: tuple[int, ...]
    """Of each size in ``CHUNKS``, how many chunks there are."""
    in_chunks: tuple[int, ...] | None
    """Of each size, neurons in their unions, added up. None of experts: which of them a row is of is not
    known, and so not which neurons are the same."""
    batches: tuple[int, ...]
    """Of each size in ``BATCHES``, how many positions of groups of sequences there are."""
    in_batches: tuple[int, ...] | None
    """Of each size, neurons in their unions, added up. None of experts."""

    def check(self) -> bool:
        for sizes, counts, active in (
            (CHUNKS, self.chunks, self.in_chunks),
            (BATCHES, self.batches, self.in_batches),
        ):
            if len(counts) != len(sizes) or len(active or counts) != len(sizes):
                return False
            if active and any(a > n * self.neurons for n, a in zip(counts, active, strict=True)):
                return False
        return True

    def shares(self) -> dict[str, tuple[float, float] | None]:
        found: dict[str, tuple[float, float] | None] = {}
        for unit, sizes, counts, active in (
            ("token", CHUNKS, self.chunks, self.in_chunks),
            ("sequence", BATCHES, self.batches, self.in_batches),
        ):
            for i, size in enumerate(sizes):
                title = f"{size} {unit}{'s' if size > 1 else ''}"
                found[title] = None if active is None else (active[i], counts[i] * self.neurons)
        return found


class Union(Metric):
    """Counts the neurons in the unions of each batch."""

    name = "union"
    about = (
        "share of neurons that are not exactly zero for at least one of so many consecutive tokens of a "
        "sequence, or of so many sequences of a batch at the same position"
    )
    site = "h"
    layer = LayerUnion

    def __init__(self, block: Block) -> None:
        super().__init__(block)
        self._chunks, self._batches = [0] * len(CHUNKS), [0] * len(BATCHES)
        self._active: Tensor | None = None
        """int64 ``[sizes of chunks and of batches]``."""

    def count(self, values: Tensor, routed: bool) -> None:
        if routed:
            return
        if len(values) != sum(self.lengths):
            raise ValueError(
                f"{self.block.name} received {len(values)} tokens of a batch of {sum(self.lengths)}, so "
                f"that its sequences cannot be told apart; leave out the metric {self.name!r}."
            )
        sequences = (values != 0).split(list(self.lengths))  # NaN is a value: it is not silence
        active = [
            *_chunks(sequences, self._chunks),
            *_batches(sequences, self._batches),
        ]
        now = torch.stack(active)
        self._active = now if self._active is None else self._active + now

    def result(self) -> LayerUnion:
        sums = [0] * (len(CHUNKS) + len(BATCHES)) if self._active is None else self._active.tolist()
        return LayerUnion(
            **self.about_block(),
            chunks=tuple(self._chunks),
            in_chunks=None if self.routed else tuple(sums[: len(CHUNKS)]),
            batches=tuple(self._batches),
            in_batches=None if self.routed else tuple(sums[len(CHUNKS) :]),
        )


def _chunks(sequences: Sequence[Tensor], counts: list[int]) -> list[Tensor]:
    """By size of chunk the neurons in the unions of ``sequences``, bool ``[S, F]``; adds to ``counts``."""
    found = [torch.zeros((), dtype=torch.int64, device=sequences[0].device) for _ in counts]
    for union_NF in sequences:
        for i in range(len(counts)):
            if i:  # a chunk is two of half the size
                union_NF = union_NF[: len(union_NF) // 2 * 2].unflatten(0, (-1, 2)).any(1)
            counts[i] += len(union_NF)
            found[i] = found[i] + union_NF.sum()
    return found


def _batches(sequences: Sequence[Tensor], counts: list[int]) -> list[Tensor]:
    """The same by number of sequences."""
    found = [torch.zeros((), dtype=torch.int64, device=sequences[0].device) for _ in counts]
    for i in range(len(counts)):
        if i:
            pairs = zip(sequences[::2], sequences[1::2], strict=False)
            sequences = [a[: len(b)] | b[: len(a)] for a, b in pairs]
        for union_SF in sequences:
            counts[i] += len(union_SF)
            found[i] = found[i] + union_SF.sum()
    return found
