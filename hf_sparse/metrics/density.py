"""Density by token and by neuron: how many neurons a token needs, and how many tokens need a neuron."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from hf_sparse.adapters import Block
from hf_sparse.metrics.metric import LayerMetric, Metric

ALWAYS_ON = 0.99
"""A neuron that is active for more than this share of the tokens is always on."""
QUANTILES = {"5 % of tokens": 0.05, "median token": 0.5, "95 % of tokens": 0.95}
"""The columns of the table: so many of the tokens have at most this density."""


@dataclass(frozen=True, kw_only=True)
class LayerDensity(LayerMetric):
    """The active neurons of one block: those whose h, the input of the down projection, is not exactly 0."""

    histogram: tuple[int, ...]
    """``[F + 1]``: how many tokens have 0, 1, … F active neurons."""
    fired: tuple[int, ...] | None
    """``[F]``: for how many tokens each neuron is active. None of experts, where a column is a neuron of each
    expert; what is known of these is the histogram, of the F neurons of an expert that a token goes to."""

    def check(self) -> bool:
        sizes = len(self.histogram) == self.neurons + 1 and sum(self.histogram) == self.tokens
        if self.fired is None:
            return sizes
        of_each = len(self.fired) == self.neurons and max(self.fired, default=0) <= self.tokens
        return sizes and of_each and sum(self.fired) == self.active

    @property
    def active(self) -> int:
        """Pairs of a token and a neuron that is active for it."""
        return sum(count * tokens for count, tokens in enumerate(self.histogram))

    @property
    def dead(self) -> int | None:
        """Neurons that no token activates."""
        return None if self.fired is None else sum(count == 0 for count in self.fired)

    @property
    def always_on(self) -> int | None:
        """Neurons that more than 99 % of the tokens activate."""
        return None if self.fired is None else sum(count > ALWAYS_ON * self.tokens for count in self.fired)

    def quantile(self, q: float) -> float:
        """The least density that a share ``q`` of the tokens does not exceed, 0 to 1; NaN without tokens.

        Raises:
            ValueError: ``q`` is not in [0, 1].

        """
        if not 0 <= q <= 1:
            raise ValueError(f"q={q} is no share of the tokens; use a number from 0 to 1.")
        if not self.tokens:
            return math.nan
        least = max(1, math.ceil(q * self.tokens))
        counts = enumerate(accumulate(self.histogram))
        return next(active for active, tokens in counts if tokens >= least) / self.neurons

    def shares(self) -> dict[str, tuple[float, float] | None]:
        each = self.neurons if self.tokens else 0
        return {
            "density": (self.active, self.tokens * self.neurons),
            "dead": None if self.dead is None else (self.dead, each),
            "always on": None if self.always_on is None else (self.always_on, each),
        }

    def others(self) -> dict[str, float | None]:
        return {title: self.quantile(q) for title, q in QUANTILES.items()}


class Density(Metric):
    """Counts active neurons by token and active tokens by neuron."""

    name = "density"
    about = (
        "share of neurons that are not exactly zero at the down projection, and what so many of the tokens "
        "do not exceed; neurons that are zero for all tokens, and that are not for more than 99 %"
    )
    site = "h"
    layer = LayerDensity

    def __init__(self, block: Block) -> None:
        super().__init__(block)
        self._histogram = torch.zeros(self.neurons + 1, dtype=torch.int64)
        self._fired = torch.zeros(self.neurons, dtype=torch.int64)

    def count(self, values: Tensor, routed: bool) -> None:
        active_TF = values != 0  # NaN is a value: it is not silence
        self._fired = self._fired.to(values.device) + active_TF.sum(0)
        by_active = torch.bincount(active_TF.sum(1), minlength=self.neurons + 1)
        self._histogram = self._histogram.to(values.device) + by_active

    def result(self) -> LayerDensity:
        return LayerDensity(
            **self.about_block(),
            histogram=tuple(self._histogram.tolist()),
            fired=None if self.routed else tuple(self._fired.tolist()),
        )
