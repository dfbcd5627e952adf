"""The distribution of magnitudes, streamed: what quantiles of any number of values are read from."""

from __future__ import annotations

import torch
from torch import Tensor

_SHIFT = 15
BUCKETS = 2 ** (31 - _SHIFT)
INFINITE = 0x7F800000 >> _SHIFT
"""The first bucket of what is no finite number."""


class Magnitudes:
    """Counts of ``|x|`` in buckets that are 2**-8 of their lower end wide: 0.4 %, whatever the range.

    A bucket is the upper bits of a float32, so that nothing has to be known of the values before, and counts
    add up exactly, over batches and processes. 512 KiB each.
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(BUCKETS, dtype=torch.int64)
        self._summed: Tensor | None = None

    def add(self, counts: Tensor) -> None:
        """Add what :func:`counted` gave."""
        self.counts = self.counts + counts.cpu()
        self._summed = None

    @property
    def total(self) -> int:
        """How many values there were."""
        return int(self._cumulated()[-1])

    def quantile(self, share: float) -> float:
        """The magnitude that a ``share`` of the values (0 to 1) do not exceed; between buckets by a line.

        Raises:
            ValueError: there were no values.

        """
        cumulated = self._cumulated()
        total = int(cumulated[-1])
        if not total:
            raise ValueError("there are no values to take a quantile of.")
        wanted = share * total
        if wanted <= int(self.counts[0]):  # zeros, and what is as good as
            return 0.0
        bucket = int(torch.searchsorted(cumulated, wanted))
        before, low, high = self._at(bucket)
        return low + (high - low) * (wanted - before) / int(self.counts[bucket])

    def at_most(self, magnitude: float) -> float:
        """The share of the values that do not exceed ``magnitude``; the inverse of :meth:`quantile`.

        Raises:
            ValueError: there were no values.

        """
        if not self.total:
            raise ValueError("there are no values to take a share of.")
        bucket = int(_buckets(torch.tensor(magnitude)))
        before, low, high = self._at(bucket)
        within = 1.0 if bucket == 0 else (magnitude - low) / (high - low)
        return (before + within * int(self.counts[bucket])) / self.total

    def _at(self, bucket: int) -> tuple[int, float, float]:
        """How many values are below a bucket, and its ends."""
        before = int(self._cumulated()[bucket - 1]) if bucket else 0
        low, high = edges(torch.tensor([bucket, bucket + 1])).tolist()
        return before, low, high

    def _cumulated(self) -> Tensor:
        if self._summed is None:
            self._summed = self.counts.cumsum(0)
        return self._summed


def counted(values: Tensor, weights: Tensor | None = None) -> Tensor:
    """Int64 counts of the magnitudes of ``values``, of any shape and floating dtype.

    ``weights``, int64 of the same shape, say how often each counts.
    """
    found = torch.zeros(BUCKETS, dtype=torch.int64, device=values.device)
    if weights is None:
        weights = found.new_ones(1).expand(values.shape)
    # Not bincount: how long its result is a compiler cannot know, and it takes longer.
    return found.index_add_(0, _buckets(values).flatten(), weights.flatten())


def _buckets(values: Tensor) -> Tensor:
    return values.detach().float().abs().view(torch.int32) >> _SHIFT


def require_finite(counts: Tensor, where: str) -> Tensor:
    """``counts`` of :func:`counted`, perhaps several of them stacked.

    Raises:
        ValueError: an infinite value or NaN was counted; ``where`` says where it is.

    """
    if counts[..., INFINITE:].any():
        raise ValueError(
            f"{where} has values that are infinite or no number on this text; no threshold can be chosen; "
            "run the model in float32 or bfloat16, or leave out the text that leads there."
        )
    return counts


def edges(buckets: Tensor) -> Tensor:
    """The lower ends of int64 ``buckets``: float32."""
    return (buckets << _SHIFT).int().view(torch.float32)
