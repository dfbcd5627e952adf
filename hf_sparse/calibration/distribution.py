"""The distribution of values with their signs, streamed."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_sparse.calibration.magnitudes import BUCKETS, counted, edges


class Distribution:
    """Counts of x in buckets that are 2**-8 of their smaller magnitude wide, as of ``Magnitudes``; 1 MiB."""

    def __init__(self) -> None:
        self.counts = torch.zeros(2, BUCKETS, dtype=torch.int64)
        """``[2, buckets]``: of values from 0 up, and of those below."""
        self._known: tuple[Tensor, Tensor] | None = None

    @staticmethod
    def counted(values: Tensor) -> Tensor:
        """What :meth:`add` takes, of values of any shape and floating dtype."""
        values = values.detach().float()
        below = values < 0
        return torch.stack([counted(values[~below]), counted(values[below])])  # NaN among the first

    def add(self, counts: Tensor) -> None:
        """Add what :meth:`counted` gave."""
        self.counts = self.counts + counts.cpu()
        self._known = None

    @property
    def total(self) -> int:
        """How many values there were."""
        return int(self.counts.sum())

    def quantile(self, share: float) -> float:
        """The value that a ``share`` of the values, 0 to 1, do not exceed; the middle of its bucket."""
        values, counts = self._points()
        place = torch.searchsorted(counts.cumsum(0), share * counts.sum())
        return float(values[min(int(place), len(values) - 1)])

    def mode(self) -> float:
        """The most frequent value: where a Gaussian kernel's estimate of the density is highest.

        Of the values between the 1 % and 99 % quantiles; Silverman's width, 0.9 min(s, IQR / 1.34) n^-0.2.
        """
        low, high = self.quantile(0.01), self.quantile(0.99)
        values, counts = self._points()
        kept = (values >= low) & (values <= high)
        values, counts = values[kept], counts[kept]
        if low == high:
            return low
        total = counts.sum()
        mean = (values * counts).sum() / total
        spread = float(((values - mean) ** 2 * counts).sum().div(total).sqrt())
        quartiles = (self.quantile(0.75) - self.quantile(0.25)) / 1.34
        width = 0.9 * min(spread, quartiles or spread) * float(total) ** -0.2
        cells = (high - low) / _CELLS
        places = ((values - low) / cells).long().clamp(max=_CELLS - 1)
        density = torch.zeros(_CELLS, dtype=torch.float64).index_add_(0, places, counts)
        middles = low + (torch.arange(_CELLS, dtype=torch.float64) + 0.5) * cells
        kernel = torch.exp(-0.5 * ((middles[:, None] - middles) / max(width, cells)) ** 2)
        return float(middles[(kernel @ density).argmax()])

    def around(self, center: float, share: float) -> tuple[float, float]:
        """Of the ``share`` of values nearest to ``center``: mean square of the distance, and the largest.

        The mean is over all values, those further away counting nothing.
        """
        distances, counts = self._distances(center)
        within = counts.cumsum(0)
        place = min(int(torch.searchsorted(within, share * within[-1])), len(within) - 1)
        lost = (distances[: place + 1] ** 2 * counts[: place + 1]).sum() / within[-1]
        return float(lost), float(distances[place]) if share > 0 else 0.0

    def within(self, center: float, distance: float) -> float:
        """The share of the values that are no further than ``distance`` from ``center``."""
        distances, counts = self._distances(center)
        return float(counts[distances <= distance * (1 + 1e-6)].sum() / counts.sum())

    def _distances(self, center: float) -> tuple[Tensor, Tensor]:
        values, counts = self._points()
        order = (distances := (values - center).abs()).argsort()
        return distances[order], counts[order]

    def _points(self) -> tuple[Tensor, Tensor]:
        """Middles of the buckets that have values, in order, and their counts; float64."""
        if self._known is None:
            if not self.total:
                raise ValueError("there are no values to take a quantile of.")
            up, down = (counts.nonzero().flatten() for counts in self.counts)
            values = torch.cat([-_middles(down).flip(0), _middles(up)])
            counts = torch.cat([self.counts[1][down].flip(0), self.counts[0][up]])
            self._known = values, counts.double()
        return self._known


_CELLS = 1024


def _middles(buckets: Tensor) -> Tensor:
    # The first bucket is of zeros, and of what is as good as.
    return ((edges(buckets).double() + edges(buckets + 1).double()) / 2).masked_fill(buckets == 0, 0.0)
