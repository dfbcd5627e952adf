"""Checks of values that may be anything: of a checkpoint's config, a recipe, a command line.

Sizes are looked at before elements, and a message shows no more of a value than a line holds.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Collection, Mapping
from typing import Any

MAX_BLOCKS = 65_536
"""More MLP blocks than any model has: longer lists are refused without a look at their elements."""

_MAX_FIELDS = 64
_MAX_DEPTH = 8
_FLOAT32_MAX = 3.4028234663852886e38


def shown(value: Any) -> str:
    """``value`` for a message: short, in ASCII, so that look-alike letters show."""
    text = _SHORT.repr(value)
    return text if len(text) <= 160 else f"{text[:160]}..."


def number(field: str, value: Any) -> float:
    """``value`` as a float that float32 can hold.

    Raises:
        ValueError: it is no such number.

    """
    try:
        ok = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer beyond float64
        ok = False
    if not ok:
        raise ValueError(f"{field}={shown(value)} is not a finite number.")
    if abs(value) > _FLOAT32_MAX:
        raise ValueError(f"{field}={shown(value)} is beyond what float32 can hold.")
    return float(value) + 0.0  # -0.0 becomes 0.0


def require_positive(**sizes: int | None) -> None:
    """Sizes by name; None is left out.

    Raises:
        ValueError: one is below 1.

    """
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ValueError(f"{name}={size} is out of range; use 1 or more.")


def numbers(field: str, value: Any) -> float | tuple[float, ...]:
    """One number, or one for each block.

    Raises:
        ValueError: it is neither.

    """
    if not isinstance(value, list | tuple):
        return number(field, value)
    sized(field, value)
    if not value:
        raise ValueError(f"{field}={shown(value)} has no value; give one number, or one per patched block.")
    return tuple(number(field, v) for v in value)


def indices(field: str, value: Any) -> tuple[int, ...]:
    """Indices of blocks, each once.

    Raises:
        ValueError: it is something else.

    """
    if isinstance(value, list | tuple):
        sized(field, value)
    if not isinstance(value, list | tuple) or not all(type(i) is int and 0 <= i < MAX_BLOCKS for i in value):
        raise ValueError(f"{field}={shown(value)} is not a sequence of block indices (integers from 0).")
    if not value:
        raise ValueError(f"{field}=() selects no block; use None for all blocks.")
    if len(set(value)) != len(value):
        raise ValueError(f"{field}={shown(value)} names a block twice.")
    return tuple(value)


def mapping(what: str, value: Any) -> dict[str, Any]:
    """``value`` as a dict with text as keys.

    Raises:
        ValueError: it is no mapping, or has other or too many keys.

    """
    if not isinstance(value, Mapping):
        raise ValueError(f"{what} is a mapping, not {type(value).__name__}: {shown(value)}.")
    if len(value) > _MAX_FIELDS:
        raise ValueError(f"{what} has {len(value)} fields, more than there are.")
    if odd := [key for key in value if not isinstance(key, str)]:
        raise ValueError(f"{what} has a field {shown(odd[0])} that is no name.")
    return dict(value)


def bounded(value: Any) -> None:
    """Refuse a value that nests more deeply than a config block does, or has more elements than blocks.

    Raises:
        ValueError: it does.

    """
    todo = [(value, 0)]
    while todo:
        one, depth = todo.pop()
        if not isinstance(one, list | tuple | Mapping):
            continue
        if depth > _MAX_DEPTH:
            raise ValueError(f"it nests more than {_MAX_DEPTH} levels: {shown(value)}.")
        sized("a list or mapping in it", one)
        todo += [(inner, depth + 1) for inner in (one.values() if isinstance(one, Mapping) else one)]


def known(what: str, values: Collection[str], names: Collection[str]) -> None:
    """Refuse ``values`` that are not among ``names``.

    Raises:
        ValueError: names the unknown ones and those that are known.

    """
    if unknown := [name for name in values if name not in names]:
        listed = ", ".join(ascii(name[:40])[1:-1] for name in unknown[:8])
        raise ValueError(f"unknown fields in {what}: {listed}; known: {', '.join(names)}.")


def sized(field: str, value: Collection[Any]) -> None:
    """Refuse a value for more blocks than models have.

    Raises:
        ValueError: it has more than :data:`MAX_BLOCKS` elements.

    """
    if len(value) > MAX_BLOCKS:
        raise ValueError(
            f"{field} has {len(value)} elements; no model has more than {MAX_BLOCKS} blocks. Give at most "
            "one value per block."
        )


class _Short(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxother, self.maxdict = 3, 80, 4

    def repr_str(self, x: str, level: int) -> str:
        return ascii(x) if len(x) <= 60 else f"{x[:60]!a}..."

    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if x.bit_length() < 128 else f"<an integer of {x.bit_length()} bits>"


_SHORT = _Short()
