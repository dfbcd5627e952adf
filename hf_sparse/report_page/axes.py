"""Where the ticks of an axis are, and what they say."""

from __future__ import annotations

import math
from dataclasses import dataclass

LOG_FROM = 8.0
"""Values that differ by a larger factor are drawn on a logarithmic axis."""


@dataclass(frozen=True, kw_only=True)
class Axis:
    """From ``low`` to ``high``, with ticks between."""

    low: float
    high: float
    ticks: tuple[float, ...]
    log: bool = False

    def place(self, value: float) -> float:
        """How far along the axis a value is, 0 to 1."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


PERCENT = Axis(low=0.0, high=100.0, ticks=(0.0, 25.0, 50.0, 75.0, 100.0))


def from_zero(largest: float) -> Axis:
    """Up to a round number that is no less than ``largest``."""
    step = _round_step(max(largest, 1e-9) / 4)
    count = max(1, math.ceil(largest / step - 1e-9))
    return Axis(low=0.0, high=count * step, ticks=tuple(i * step for i in range(count + 1)))


def around(values: list[float], *, least: float = -math.inf, most: float = math.inf) -> Axis:
    """Around all values, with room at both ends; logarithmic where they differ by a large factor.

    Args:
        values: at least one, finite.
        least: where the axis may begin at the earliest.
        most: where it may end at the latest.

    """
    low, high = min(values), max(values)
    if low > 0 and high / low > LOG_FROM:
        ticks = [m * 10.0**e for e in range(-12, 300) for m in (1, 2, 5)]
        begin = max((t for t in ticks if t <= low), default=low)
        end = min((t for t in ticks if t >= high), default=high)
        inner = [t for t in ticks if begin <= t <= end]
        inner = inner if len(inner) <= 8 else [t for t in inner if math.log10(t).is_integer()] or inner[::6]
        return Axis(low=begin, high=end, ticks=tuple(inner), log=True)
    span = high - low or max(abs(high), 1.0) * 0.2
    step = _round_step(span / 4)
    begin = max(math.floor((low - 0.05 * span) / step) * step, least)
    end = min(math.ceil((high + 0.05 * span) / step) * step, most)
    first, last = math.ceil(begin / step - 1e-9), math.floor(end / step + 1e-9)
    return Axis(low=begin, high=end, ticks=tuple(i * step for i in range(first, last + 1)))


def _round_step(about: float) -> float:
    """The 1, 2 or 5 times a power of ten that is next above."""
    power = 10.0 ** math.floor(math.log10(about))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= about * (1 - 1e-9))
