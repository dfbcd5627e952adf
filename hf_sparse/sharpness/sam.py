"""Sharpness-aware minimisation: all entries of the gradient are followed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hf_sparse.sharpness.config import SharpnessConfig
from hf_sparse.sharpness.masks import Masks
from hf_sparse.sharpness.part import Part


@dataclass(frozen=True, kw_only=True)
class SamConfig(SharpnessConfig):
    """SAM (Foret et al., arXiv 2010.01412, equation 2): ``eps = rho g / (|g| + 1e-12)``."""

    name = "sam"

    def masks(self, parts: Sequence[Part], steps: int | None) -> Masks:
        return Masks(parts)
