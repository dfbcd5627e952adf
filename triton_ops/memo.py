"""What is remembered of this machine and of the user's settings, and forgotten all at once.

:data:`epoch` is another string after each :func:`forget`. A graph that was compiled reads it, so that the
compiler guards on it and makes the graph anew (torch makes symbols of integers, but not of strings).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TypeVar

epoch = "0"
_clear: list[Callable[[], None]] = []

F = TypeVar("F", bound=Callable[..., object])


def remembered(function: F) -> F:
    """A function whose results hold until :func:`forget`; its arguments must be hashable."""
    cached = lru_cache(maxsize=None)(function)
    _clear.append(cached.cache_clear)
    return cached  # type: ignore[return-value]


def forget() -> None:
    """Choose anew from now on, after a measurement or a change of the environment."""
    global epoch
    for clear in _clear:
        clear()
    # Last: what another thread found out before then belongs to the epoch before.
    epoch = str(int(epoch) + 1)
