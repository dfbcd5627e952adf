"""Augmented flatness of the value matrix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_sparse.adapters import Block
from hf_sparse.adapters.roles import Site
from hf_sparse.flatness.pruned_matrix import PrunedMatrix
from hf_sparse.flatness.sums import Sums, pieces, squared
from hf_sparse.observing import CallObserver


@dataclass(frozen=True, kw_only=True)
class ValueSums(Sums):
    """Of one block, over T tokens; L is the summed loss of the sequence in nats.

    The value matrix V is the down projection, ``h [F]`` its input, of which a threshold may leave a part, and
    ``z [D]`` its output. What follows is about the size of h and not about its zeros: ``AF_V / Σ |∂L/∂z|²``
    is a mean of ``|h|²``, weighted by the gradients, and no density (arXiv 2605.25612).
    """

    tokens: int = 0
    """T."""
    nonzeros: int = 0
    """Values of h that V has a use for, as :func:`hf_sparse.measure` counts them: that are not zero."""
    flatness: float = 0.0
    """``AF_V = Σ_t |∂L/∂z_t|² |h_t|²``. The smaller, the flatter."""
    gradients: float = 0.0
    """``Σ_t |∂L/∂z_t|²``."""
    hidden: float = 0.0
    """``Σ_t |h_t|²``."""


class ValueFlatness(CallObserver):
    """Sums up :class:`ValueSums` of one block, of whatever form.

    Raises:
        PatchError: experts; V has a threshold on its input and an adapter.

    """

    values_at: ClassVar[tuple[Site, ...]] = ("h",)
    gradients_at: ClassVar[tuple[Site, ...]] = ("y",)

    def __init__(self, block: Block) -> None:
        super().__init__(block)
        self._sums = ValueSums()
        self._pruned = PrunedMatrix.of(block, block.roles.down)

    def result(self) -> ValueSums:
        self.require_gradients()
        return self._sums

    def update_call(self, values: Mapping[Site, Tensor], gradients: Mapping[Site, Tensor]) -> None:
        center = self._pruned.center_in(values["h"].dtype)
        for h, z_grad in pieces(values["h"], gradients["y"]):
            whole = h.float() + center  # h is given as the distance from it
            columns = squared(z_grad).sum(-1), squared(whole).sum(-1), torch.count_nonzero(h, dim=-1).float()
            grad2, h2, nonzeros = torch.stack(columns).cpu().double()
            self._sums += ValueSums(
                tokens=len(h),
                nonzeros=int(nonzeros.sum()),
                flatness=float(grad2 @ h2),
                gradients=float(grad2.sum()),
                hidden=float(h2.sum()),
            )
