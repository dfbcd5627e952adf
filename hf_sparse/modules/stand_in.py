"""What the forward of a stock class is given for ``self`` where a sparse block has other children for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn


class StandIn:
    """A block with some children replaced, in one call of a forward that needs attributes only.

    The forward keeps what it does beside the formula, such as a dropout in training, and may be compiled:
    nothing of the block is changed.
    """

    def __init__(self, block: nn.Module, children: Mapping[str, Any]) -> None:
        self._block = block
        self._children = children

    def __getattr__(self, name: str) -> Any:
        return self._children[name] if name in self._children else getattr(self._block, name)
