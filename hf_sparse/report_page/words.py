"""Numbers in words, the same in each section."""

from __future__ import annotations

import math


def share(value: float | None) -> str:
    """In percent; what is not known is ``?``, and a share of nothing a dash, as in the printed tables."""
    return "?" if value is None else "-" if math.isnan(value) else f"{value:.2%}"


def in_percent(value: float | None) -> float | None:
    """For a chart; None where there is nothing to draw."""
    return None if value is None or math.isnan(value) else 100 * value


def counted(value: int | None) -> str:
    """A count, or ``?``."""
    return "?" if value is None else f"{value:,}"


def quality(value: float) -> str:
    """A perplexity."""
    return f"{value:.4g}" if math.isfinite(value) else "not finite"


def nats(value: float) -> str:
    """A loss."""
    return f"{value:.4f}" if math.isfinite(value) else "not finite"


def milliseconds(value: float) -> str:
    """With as many digits as tell two times apart."""
    return f"{value:.3f}"
