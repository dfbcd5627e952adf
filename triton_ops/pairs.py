"""The pairs of a token and a neuron that is active for it, as a sparse matrix, and what is done with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

MOST = 2**31 - 1
"""Entries: their places are int32."""


class Pairs(NamedTuple):
    """Where a matrix ``[rows, columns]`` has entries, row by row, in ascending columns."""

    rows: int
    columns: int
    start: Tensor
    """int64 ``[rows + 1]``: the entries of row r are ``start[r]`` to ``start[r + 1]``."""
    column: Tensor
    """int32 ``[entries]``."""


class PairProducts(NamedTuple):
    """What a backend needs for training with few active neurons; tensors are on its device.

    A dense matrix may have any strides; sums are float32, in an order that depends on the pairs and the
    sizes alone.
    """

    find: Callable[[Tensor, Tensor, int], tuple[Pairs, Tensor] | None]
    """Of ``silent [R, C]`` (bool) and ``p [R, C]``, both contiguous, the pairs that are not silent, and what
    ``p`` has there, ``[entries]``; None if there are more than so many, or than :data:`MOST`."""

    transposed: Callable[[Pairs], tuple[Pairs, Tensor]]
    """The pairs of the transposed matrix, and which entry of the matrix each is: int32 ``[entries]``."""

    product: Callable[[Pairs, Sequence[tuple[Tensor, Tensor]], Tensor | None, Tensor], Tensor]
    """Of one or two S, float32 ``[entries]``, and ``b [C, N]`` for each, the sum of all ``S b``, and a bias
    ``[N]`` if one is given, in the last, ``[R, N]``, of the dtype of ``b``; gives it back."""

    sampled: Callable[[Pairs, Tensor, Tensor], Tensor]
    """Of ``a [R, N]`` and ``b [C, N]``, of one dtype, the entries of ``a bᵀ``: float32 ``[entries]``."""


def require_share(name: str, value: float) -> None:
    """Raise ValueError if ``value`` is no share of pairs."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name}={value} is not possible; it is a share of pairs, 0 to 1.")
