"""The activation classes of stock transformers."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.activations import ACT2CLS

_entries: list[Any] = list(ACT2CLS.values())
STOCK_ACTIVATIONS: tuple[type[nn.Module], ...] = tuple(
    {entry[0] if isinstance(entry, tuple) else entry for entry in _entries}
)
"""Classes only: building one of each, as ``ACT2FN`` would, prints what the rarer ones lack."""
