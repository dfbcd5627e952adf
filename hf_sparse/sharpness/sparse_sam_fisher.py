"""Sparse SAM with masks by Fisher information, of gradients of single samples."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from hf_sparse.sharpness.config import SharpnessConfig
from hf_sparse.sharpness.masks import Masks
from hf_sparse.sharpness.part import Part
from hf_sparse.sharpness.patterns import n_of_m, refuse_cut_rows, share_of, structured, unstructured

_DEFAULT_KEEP = 0.5


@dataclass(frozen=True, kw_only=True)
class SparseSamFisherConfig(SharpnessConfig):
    """SSAM-F (Mi et al., arXiv 2210.05177; patterns: arXiv 2306.17504): SAM where it matters.

    The Fisher information of an entry is the sum of its squared gradients over single samples. The loop has
    to give these to :meth:`Perturbation.update_mask` after each update for which ``samples_due`` is not 0:
    the first, and every ``interval`` from there. Before the first mask nothing is perturbed. The sparsity s
    of the papers is ``1 - keep``.
    """

    name = "sparse_sam_fisher"

    keep: float | None = None
    """Share of the entries that is perturbed; none means 0.5 (published: 0.5 and 0.8), and is the only choice
    for n:m."""

    pattern: str = "unstructured"
    """``unstructured``: the entries with most Fisher information of all; ``structured``: the parameters with
    the largest mean of it; ``2:4`` (n:m): two of each four neighbours along the inputs, and vectors whole."""

    samples: int = 16
    """Samples in a sum, over all processes (published: 16 to 1,024)."""

    interval: int = 100
    """Updates between new masks (published: one epoch)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_at_least(1, "samples", "interval")
        if self.keep is not None:
            self._require_share("keep")
            self._require(self._groups is None, "keep", f"pattern={self.pattern} decides it; leave it out")
        if self._groups is not None:
            n, m = self._groups
            self._require(0 < n <= m, "pattern", "of n:m, n must be at least 1 and at most m")
        elif self.pattern not in ("unstructured", "structured"):
            self._require(False, "pattern", "choose unstructured, structured, or n:m such as 2:4")

    @property
    def _groups(self) -> tuple[int, int] | None:
        found = re.fullmatch(r"([0-9]{1,4}):([0-9]{1,4})", self.pattern)
        return (int(found[1]), int(found[2])) if found else None

    def masks(self, parts: Sequence[Part], steps: int | None) -> Masks:
        if self._groups:
            refuse_cut_rows(parts)
        kept = share_of(parts, self.keep or _DEFAULT_KEEP)
        self._require(kept > 0, "keep", "of so few parameters it is not one entry; raise it")
        return _Masks(self, parts)

    def made_of(self, fisher: Sequence[Tensor], parts: Sequence[Part]) -> list[Tensor | bool]:
        """The masks by sums of squared gradients, of the local shapes of ``parts``."""
        if self._groups:
            return n_of_m(fisher, *self._groups, parts)
        make = structured if self.pattern == "structured" else unstructured
        return make(fisher, self.keep or _DEFAULT_KEEP, parts)


class _Masks(Masks):
    def __init__(self, config: SparseSamFisherConfig, parts: Sequence[Part]) -> None:
        super().__init__(parts, start=False)
        self._config = config

    def samples_due(self, step: int) -> int:
        unmade = all(mask is False for mask in self.values)
        return self._config.samples if unmade or (step - 1) % self._config.interval == 0 else 0

    def update(self, fisher: Sequence[Tensor]) -> None:
        self.values = self._config.made_of(fisher, self.parts)
