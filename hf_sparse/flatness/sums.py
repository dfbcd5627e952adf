"""What observers count: sums over tokens, so that those over parts of the data add up."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import TypeVar

from torch import Tensor

Self = TypeVar("Self", bound="Sums")

_VALUES = 2**22


@dataclass(frozen=True, kw_only=True)
class Sums:
    """Numbers, each a sum over tokens."""

    def __add__(self: Self, other: Self) -> Self:
        """Over the tokens of both."""
        return type(self)(
            **{one.name: getattr(self, one.name) + getattr(other, one.name) for one in fields(self)}
        )


def pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """``tensors`` ``[T, any]`` in step, a bounded number of tokens at a time."""
    rows = max(1, _VALUES // max(one.shape[-1] for one in tensors))
    yield from zip(*(one.split(rows) for one in tensors), strict=True)


def squared(values: Tensor) -> Tensor:
    """Squares in float32: of bfloat16 they would have three digits."""
    return values.float().square()
