"""CETT, the cumulative error of tail truncation: what is lost when neurons that add little are left out.

Sparsing Law (arXiv 2411.02335, section on the metric). Neuron j of a block adds ``n_j = h_j W_down[:, j]``
to its output. With a threshold t, the tail of a token is ``{j: |n_j| <= t}``, and its error is
``|sum of n_j over the tail| / |sum of all n_j|``, in L2 norms: a bias of the down projection is no neuron's.
Unlike exact zeros a tail is there with any activation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding_bag

from hf_sparse.adapters import Block
from hf_sparse.adapters.experts import Experts
from hf_sparse.adapters.pruning import column_norms
from hf_sparse.adapters.roles import input_pruning, read_linear
from hf_sparse.errors import PatchError
from hf_sparse.metrics.metric import LayerMetric, Metric
from hf_sparse.modules import SparseLinear
from hf_sparse.modules.surroundings import has_own_forward, is_plain

PER_DOUBLING = 8
"""Candidates per factor of two."""
THRESHOLDS = (0.0, *(2 ** (k / PER_DOUBLING) for k in range(-16 * PER_DOUBLING, 16 * PER_DOUBLING + 1)))
"""0, and 257 candidates from 1.5e-5 to 65,536, each 9 % above the one before. They are the same for every
block of every model, so that results add up. Published are 65,536 at equal distances, from the least to the
99th percentile of the norms."""
TARGETS = (0.05, 0.1, 0.2, 0.5)
"""The columns of the table."""
_ROWS = 1024  # at once


@dataclass(frozen=True, kw_only=True)
class LayerCETT(LayerMetric):
    """The error and the size of the tail of one block, at each of ``THRESHOLDS``."""

    errors: tuple[float, ...]
    """The error at each threshold, summed over tokens; of a token that the block gives nothing, 0."""
    removed: tuple[int, ...]
    """Pairs of a token and a neuron in its tail, at each threshold."""

    def check(self) -> bool:
        sizes = len(self.errors) == len(self.removed) == len(THRESHOLDS)
        rises = all(a <= b for a, b in zip(self.removed, self.removed[1:], strict=False))
        return sizes and rises and self.errors[0] == 0 and self.removed[-1] <= self.tokens * self.neurons

    def threshold(self, cett: float) -> float:
        """The least threshold at which the mean error over tokens is ``cett``, 0 <= cett < 1.

        Between two candidates the error is taken for a power of the threshold. Everything is removed where
        the error is never as large, as that of a block that gives nothing: the largest candidate.

        Raises:
            ValueError: ``cett`` is out of range, there are no tokens, or only a threshold beyond the
                candidates would do.

        """
        return self._place(cett)[0]

    def sparsity(self, cett: float) -> float:
        """The share of neurons in the tail at that threshold, 0 to 1.

        Between two candidates it is taken to grow with the logarithm of the threshold, which may be off by a
        percentage point where many neurons are alike, such as those at the minimum of a GELU.

        Raises:
            ValueError: as of :meth:`threshold`.

        """
        _, k, part = self._place(cett)
        below = self.removed[k - 1]
        return (below + part * (self.removed[k] - below)) / (self.tokens * self.neurons)

    def _place(self, cett: float) -> tuple[float, int, float]:
        """The threshold, the first candidate above it, and how far it is on the way there, 0 to 1."""
        if not 0 <= cett < 1:
            raise ValueError(f"cett={cett} is out of range; it is a share of the output, from 0 to below 1.")
        if not self.tokens:
            raise ValueError(f"no token reached {self.name}, so it has no CETT.")
        errors = [one / self.tokens for one in self.errors]
        k = next((k for k, error in enumerate(errors) if error > cett), None)
        if k is None:
            if self.removed[-1] < self.tokens * self.neurons:
                raise ValueError(
                    f"some neurons of {self.name} add more than {THRESHOLDS[-1]:,.0f} to its output, and no "
                    f"threshold up to there gives cett={cett}."
                )
            return THRESHOLDS[-1], len(errors) - 1, 1.0
        low, high = errors[k - 1], errors[k]  # at 0 there is no error, so k is at least 1
        if k == 1:
            return THRESHOLDS[1] * cett / high, k, cett / high
        part = math.log(cett / low) / math.log(high / low) if low and cett else cett / high
        part = min(max(part, 0.0), 1.0)
        return THRESHOLDS[k - 1] * 2 ** (part / PER_DOUBLING), k, part

    def shares(self) -> dict[str, tuple[float, float] | None]:
        return {f"at CETT {cett:g}": self._share(cett) for cett in TARGETS}

    def _share(self, cett: float) -> tuple[float, float] | None:
        every = self.tokens * self.neurons
        if every and self.removed[-1] < every and self.errors[-1] <= cett * self.tokens:
            return None  # beyond the candidates
        return (self.sparsity(cett) * every if every else 0, every)


class CETT(Metric):
    """Sums the error over tokens, threshold by threshold, in float32.

    Each value of h that is not zero is multiplied once with its column of the down projection, but by itself:
    that takes several times what the product takes.

    Raises:
        PatchError: the block has stacked experts, or the weight of its down projection cannot be read.

    """

    name = "cett"
    about = (
        "share of neurons that may be left out, those that add least, until the error of the block's output "
        "is so large (CETT, arXiv 2411.02335)"
    )
    site = "h"
    layer = LayerCETT

    def __init__(self, block: Block) -> None:
        super().__init__(block)
        readable_down(block)
        self._errors = torch.zeros(len(THRESHOLDS), dtype=torch.float64)
        self._removed = torch.zeros(len(THRESHOLDS) + 1, dtype=torch.int64)

    def count(self, values: Tensor, routed: bool) -> None:
        weight_FD = down_weight(self.block).to(values.device).float().t().contiguous()
        norms_F = column_norms(weight_FD.t())
        candidates = torch.tensor(THRESHOLDS, device=values.device)
        for rows in values.split(_ROWS):
            h_TF = rows.float()
            places_TF = torch.bucketize(contributions(h_TF, norms_F), candidates, out_int32=True)
            errors, counts = _errors(h_TF, places_TF, weight_FD)
            self._errors += errors.cpu()
            self._removed += counts.cpu()

    def result(self) -> LayerCETT:
        if not self._errors.isfinite().all():
            raise ValueError(f"values that are not finite reach the down projection of {self.block.name}.")
        return LayerCETT(
            **self.about_block(),
            errors=tuple(self._errors.tolist()),
            removed=tuple(accumulate(self._removed.tolist()[:-1])),
        )


def _errors(h: Tensor, places: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Of ``h [T, F]`` the error at each threshold, summed over tokens; and how many values have each place.

    ``places [T, F]``: the first threshold that is not below the contribution; ``weight``: ``[F, D]``.
    """
    tokens, neurons = h.shape
    counts = torch.bincount(places.flatten(), minlength=len(THRESHOLDS) + 1)
    whole_T = (h @ weight).norm(dim=1)
    tail_TD = torch.zeros(tokens, weight.shape[1], device=h.device)
    error = (0 * whole_T).sum()  # NaN, and not 0, where a value is not finite
    order = places.flatten().argsort(stable=True)  # by place, of these by token: each value is added once
    errors, begin = [], 0
    for place, count in enumerate(counts.tolist()[:-1]):
        if place and count:
            now = order[begin : begin + count]
            by_token = torch.bincount(now // neurons, minlength=tokens)
            tail_TD += embedding_bag(
                now % neurons,
                weight,
                by_token.cumsum(0) - by_token,
                mode="sum",
                per_sample_weights=h.flatten()[now],
            )
            error = (tail_TD.norm(dim=1) / whole_T).masked_fill(whole_T == 0, 0).sum()
        errors.append(error)
        begin += count
    return torch.stack(errors), counts


def contributions(h: Tensor, norms: Tensor) -> Tensor:
    """The norm of what each neuron adds to the output, float32: ``h [..., F]`` with :func:`column_norms`."""
    return h.float().abs() * norms


def readable_down(block: Block) -> nn.Module:
    """The down projection of ``block``, if it computes a product with a weight that may be read, and a bias.

    Raises:
        PatchError: there is none, or it does something else.

    """
    if isinstance(block.roles, Experts):
        raise PatchError(
            f"{block.name} has stacked experts, whose tokens have several outputs: CETT is defined for one. "
            "Leave the metric out for this model."
        )
    down = block.module.get_submodule(block.roles.down)
    plain = has_own_forward(down) or type(down) is SparseLinear
    weight = down._parameters.get("weight")
    if not plain or not is_plain(weight) or weight is None or weight.is_meta:
        raise PatchError(
            f"the down projection of {block.name} is a {type(down).__name__} whose weight cannot be read (an "
            "adapter, quantised, offloaded or split): CETT needs the norms of its columns. Merge or load it "
            "as a plain layer."
        )
    if input_pruning(down):
        raise PatchError(
            f"the down projection of {block.name} has a threshold on its inputs already, so that h does not "
            "say what a neuron adds. Measure CETT without that layer among the inputs of the patch."
        )
    return down


def down_weight(block: Block) -> Tensor:
    """``[D, F]``."""
    return read_linear(readable_down(block))[0].detach()
