"""Sparse SAM with a mask that is random at first and exchanges entries while training goes on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256

import torch
from torch import Tensor

from hf_sparse.fields import require
from hf_sparse.sharpness.config import SharpnessConfig
from hf_sparse.sharpness.masks import Masks, zeros_if_none
from hf_sparse.sharpness.part import Part, total
from hf_sparse.sharpness.patterns import share_of
from hf_sparse.sharpness.select import Keys, float_keys, largest, pieces

_BITS = 0xFFFF_FFFF


@dataclass(frozen=True, kw_only=True)
class SparseSamDynamicConfig(SharpnessConfig):
    """SSAM-D (Mi et al., arXiv 2210.05177): SAM on a mask that drops the flat and grows others.

    Every ``interval`` updates, at step t of T, the share ``drop / 2 * (1 + cos(pi t / T))`` of the entries in
    the mask is dropped, those with the smallest gradient, and as many are grown at random among those that
    were not in it. The gradient is that before the perturbation, and the new mask serves from the next update
    on, as in the released code. The sparsity s of the paper is ``1 - keep``.
    """

    name = "sparse_sam_dynamic"

    keep: float = 0.5
    """Share of the entries that is perturbed (published: 0.5 and 0.8)."""

    drop: float = 0.5
    """Share of the mask that is exchanged at the beginning (published: 0.5)."""

    interval: int = 100
    """Updates between exchanges (published: one epoch)."""

    seed: int = 0
    """Seed of the random mask and of what is grown; they do not touch torch's random state."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_share("keep")
        self._require(0 <= self.drop <= 1, "drop", "it must be a share, 0 to 1")
        self._require_at_least(1, "interval")
        self._require_at_least(0, "seed")

    def drop_share(self, step: int, steps: int) -> float:
        """Share of the mask that is exchanged at update ``step`` of ``steps``."""
        return self.drop / 2 * (1 + math.cos(math.pi * min(step / steps, 1.0)))

    def masks(self, parts: Sequence[Part], steps: int | None) -> Masks:
        mend = "sparse_sam_dynamic needs the number of updates in the whole run, at least 1"
        require(steps is not None and steps >= 1, "steps", steps, mend)
        self._require(
            share_of(parts, self.keep) > 0, "keep", "of so few parameters it is not one entry; raise it"
        )
        return _Masks(self, parts, steps or 1)


class _Masks(Masks):
    def __init__(self, config: SparseSamDynamicConfig, parts: Sequence[Part], steps: int) -> None:
        super().__init__(parts)
        self._config, self._steps = config, steps
        self.values = list(largest(self._random(0), share_of(parts, config.keep), parts))

    def after(self, step: int, gradients: Sequence[Tensor | None]) -> None:
        if step % self._config.interval:
            return
        sizes = [float_keys(zeros_if_none(g, part)) for g, part in zip(gradients, self.parts, strict=True)]
        masks = [torch.as_tensor(mask).view(-1) for mask in self.values]
        live = int(total([mask.sum() for mask in masks], self.parts))
        dead = sum(part.parameter.numel() for part in self.parts) - live
        dropped = min(round(live * self._config.drop_share(step, self._steps)), dead)
        kept = largest(_among(sizes, masks), live - dropped, self.parts)
        grown = largest(_among(self._random(step), [~mask for mask in masks]), dropped, self.parts)
        self.values = [one | other for one, other in zip(kept, grown, strict=True)]

    def _random(self, step: int) -> list[Keys]:
        """Random keys: functions of seed, step, parameter and position, and not of who holds the entry."""
        return [_hashed(f"{self._config.seed}/{step}/{part.name}", part) for part in self.parts]


def _among(keys: Sequence[Keys], masks: Sequence[Tensor]) -> list[Keys]:
    def among(key: Keys, mask: Tensor) -> Keys:
        return lambda piece: torch.where(mask[piece], key(piece), -1)

    return [among(key, mask) for key, mask in zip(keys, masks, strict=True)]


def _hashed(salt: str, part: Part) -> Keys:
    digest = sha256(salt.encode()).digest()
    low, high = (int.from_bytes(digest[i : i + 4], "little") for i in (0, 4))

    keys = torch.empty(part.local().numel(), dtype=torch.int32, device=part.local().device)
    for piece in pieces(part):
        position = part.positions(piece)
        mixed = _mix((position & _BITS) ^ low)
        keys[piece] = _mix((mixed + (position >> 32)) & _BITS ^ high) >> 1
    return lambda piece: keys[piece]


def _mix(x: Tensor) -> Tensor:
    """The finalizer of MurmurHash3, of 32-bit integers in int64."""
    x = _times(x ^ (x >> 16), 0x85EB_CA6B)
    x = _times(x ^ (x >> 13), 0xC2B2_AE35)
    return x ^ (x >> 16)


def _times(x: Tensor, factor: int) -> Tensor:
    """``x * factor`` modulo 2**32, with no intermediate beyond int64."""
    low, high = factor & 0xFFFF, factor >> 16
    return (x * low + ((x * high & 0xFFFF) << 16)) & _BITS
