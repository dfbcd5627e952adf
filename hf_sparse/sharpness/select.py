"""The largest of numbers that lie in many tensors and processes, without gathering or sorting them.

The threshold is found digit by digit, from the most significant: a pass counts the keys with the digits
found so far by their next one, and the counts are summed over processes. Two passes settle the 31 bits of a
nonnegative float32, exactly. Of keys that equal the threshold the first in the order of parameters and
entries are taken, so that the outcome is the same however the parameters are sharded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from hf_sparse.sharpness.part import Part, total

Keys = Callable[[slice], Tensor]
"""Gives integers for a piece of the flat local entries of one parameter; -1 for those not to be taken."""

KEY_BITS = 31
_DIGIT_BITS = 16
_PIECE = 1 << 22
"""Entries looked at together, so that a pass takes little memory."""


def float_keys(values: Tensor) -> Keys:
    """Keys in the order of the sizes of ``values``, which have any shape and no NaN."""
    flat = values.reshape(-1)
    # The bits of nonnegative floats are in the order of their values.
    return lambda piece: flat[piece].float().abs().view(torch.int32)


def largest(keys: Sequence[Keys], count: int, parts: Sequence[Part]) -> list[Tensor]:
    """Masks (bool, of the local shapes) of the ``count`` largest keys of all ``parts`` together.

    ``count`` is at most the number of keys. All processes have to ask.
    """
    if count == 0:
        return [torch.zeros_like(part.local(), dtype=torch.bool) for part in parts]
    threshold, ties, equal = _threshold(keys, count, KEY_BITS, parts)
    last = (len(parts), 0) if ties == equal else _last_tie(keys, threshold, ties, parts)
    masks = []
    for index, (key, part) in enumerate(zip(keys, parts, strict=True)):
        mask = torch.empty(part.local().numel(), dtype=torch.bool, device=part.local().device)
        for piece in pieces(part):
            found = key(piece)
            mask[piece] = found > threshold
            if index < last[0]:
                mask[piece] |= found == threshold
            elif index == last[0]:
                mask[piece] |= (found == threshold) & (part.positions(piece) <= last[1])
        masks.append(mask.view(part.local().shape))
    return masks


def pieces(part: Part) -> Iterator[slice]:
    """The flat local entries of ``part``, some at a time."""
    size = part.local().numel()
    for begin in range(0, size, _PIECE):
        yield slice(begin, min(begin + _PIECE, size))


def _threshold(keys: Sequence[Keys], count: int, bits: int, parts: Sequence[Part]) -> tuple[int, int, int]:
    """The key that is number ``count`` from above; how many equal it, of these ``count`` and of all."""
    found, shift, equal = 0, bits, 0
    while shift:
        width = min(_DIGIT_BITS, shift)
        shift -= width
        digits = [_digits(key, found, shift, width, part) for key, part in zip(keys, parts, strict=True)]
        counts = total(digits, parts).flip(0)
        upto = counts.cumsum(0)
        above = int(torch.searchsorted(upto, count))
        equal = int(counts[above])
        count -= int(upto[above]) - equal
        found = (found << width) | ((1 << width) - 1 - above)
    return found, count, equal


def _digits(key: Keys, found: int, shift: int, width: int, part: Part) -> Tensor:
    """How many keys that begin with ``found`` have each value of the next digit, int64 ``[2**width]``."""
    none = 1 << width
    counts = torch.zeros(none, dtype=torch.int64, device=part.local().device)
    for piece in pieces(part):
        rest = key(piece) >> shift
        digit = torch.where((rest >> width) == found, rest & (none - 1), none)
        counts += torch.bincount(digit, minlength=none + 1)[:none]
    return counts


def _last_tie(keys: Sequence[Keys], threshold: int, ties: int, parts: Sequence[Part]) -> tuple[int, int]:
    """Index of the parameter, and position in it, of tie number ``ties``."""
    counts = []
    for index, (key, part) in enumerate(zip(keys, parts, strict=True)):
        count = torch.zeros(len(parts), dtype=torch.int64, device=part.local().device)
        for piece in pieces(part):
            count[index] += (key(piece) == threshold).sum()
        counts.append(count)
    upto = total(counts, parts).cumsum(0).tolist()
    index = next(index for index, so_many in enumerate(upto) if so_many >= ties)
    key, part = keys[index], parts[index]
    bits = part.parameter.numel().bit_length()
    end = (1 << bits) - 1

    def from_the_end(piece: slice) -> Tensor:
        return torch.where(key(piece) == threshold, end - part.positions(piece), -1)

    nearest, _, _ = _threshold([from_the_end], ties - (upto[index - 1] if index else 0), bits, [part])
    return index, end - nearest
