"""Masks by how large a score is: of single entries, of whole parameters, of n in each m along the inputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_sparse.sharpness.part import Part, total
from hf_sparse.sharpness.select import float_keys, largest

Mask = Tensor | bool
"""Bool, of the local shape of a parameter; True or False for all of it."""


def share_of(parts: Sequence[Part], share: float) -> int:
    """So many of all entries of ``parts``, rounded."""
    return round(share * sum(part.parameter.numel() for part in parts))


def unstructured(scores: Sequence[Tensor], share: float, parts: Sequence[Part]) -> list[Mask]:
    """The entries with the largest scores over all parameters, ``share`` of all; of equal ones the first."""
    return list(largest([float_keys(score) for score in scores], share_of(parts, share), parts))


def structured(scores: Sequence[Tensor], share: float, parts: Sequence[Part]) -> list[Mask]:
    """Whole parameters, those with the largest mean score first, until they have ``share`` of all entries.

    The last one taken may bring more than that; at least one is taken.
    """
    sums = []
    for index, score in enumerate(scores):
        sums.append(torch.zeros(len(parts), device=score.device))
        sums[-1][index] = score.sum()
    sizes = [part.parameter.numel() for part in parts]
    means = [value / size for value, size in zip(total(sums, parts).tolist(), sizes, strict=True)]
    wanted, taken = share_of(parts, share), set[int]()
    for index in sorted(range(len(parts)), key=lambda i: -means[i]):
        if not taken or sum(sizes[i] for i in taken) < wanted:
            taken.add(index)
    return [index in taken for index in range(len(parts))]


def n_of_m(scores: Sequence[Tensor], n: int, m: int, parts: Sequence[Part]) -> list[Mask]:
    """The n largest scores of each m neighbours in a row of inputs, of equal ones the first.

    Vectors are taken whole. Of what is left at the end of a row, n are taken, too, or all if it has no more.
    """
    return [_rows(s, n, m, p) if p.parameter.ndim > 1 else True for s, p in zip(scores, parts, strict=True)]


def refuse_cut_rows(parts: Sequence[Part]) -> None:
    """Refuse parameters whose rows of inputs are not whole in this process.

    Raises:
        ValueError: names the first of them.

    """
    for part in parts:
        own = part.parameter
        if not part.is_sharded or own.ndim < 2:
            continue
        across = {"last": {own.ndim - 1}, "flat": set(range(1, own.ndim)), "transposed": {own.ndim - 2}}
        placements = [one for one in own.placements if not one.is_replicate()]  # type: ignore[attr-defined]
        if any(one.dim in across[part.inputs] for one in placements):
            raise ValueError(
                f"pattern: the rows of inputs of {part.name!r} are cut by its sharding {tuple(placements)}, "
                "so no process sees whole groups; use pattern=unstructured, exclude it, or shard its outputs."
            )


def _rows(score: Tensor, n: int, m: int, part: Part) -> Tensor:
    flat = score.flatten(1) if part.inputs == "flat" else score
    rows = flat.transpose(-1, -2) if part.inputs == "transposed" else flat
    length = rows.shape[-1]
    # Scores are at least 0: what fills the last group up comes after all of them.
    filled = F.pad(rows, (0, -length % m), value=-1.0)
    groups = filled.unflatten(-1, (filled.shape[-1] // m, m))
    mask = torch.empty_like(groups, dtype=torch.bool)
    for i in range(m):
        own = groups[..., i : i + 1]
        before = (groups > own).sum(-1) + (groups[..., :i] == own).sum(-1)
        mask[..., i] = before < n
    found = mask.flatten(-2)[..., :length]
    return (found.transpose(-1, -2) if part.inputs == "transposed" else found).reshape(score.shape)
