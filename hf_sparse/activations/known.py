"""The activation classes of stock transformers."""

from __future__ import annotations

from torch import nn
from transformers.activations import ACT2CLS

STOCK_ACTIVATIONS: tuple[type[nn.Module], ...] = tuple(
    {entry[0] if isinstance(entry, tuple) else entry for entry in ACT2CLS.values()}
)
"""Classes only: building one of each, as ``ACT2FN`` would, prints what the rarer ones lack."""
