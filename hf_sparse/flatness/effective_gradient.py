"""Effective gradient sparsity: how few neurons the loss depends on to first order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_sparse.adapters import Block
from hf_sparse.adapters.roles import Site
from hf_sparse.flatness.sums import Sums, pieces
from hf_sparse.observing import CallObserver


@dataclass(frozen=True, kw_only=True)
class EffectiveGradientSums(Sums):
    """Of one block, over T tokens: of ``η = ∂L/∂p = g ⊙ σ'(p)``, ``[F]`` for each (arXiv 2309.03004).

    L is the summed loss of the sequence in nats, and the thresholds, those of the released code, are in its
    units. ``shares`` does not depend on them.
    """

    tokens: int = 0
    """T."""
    zeros: int = 0
    """Entries of η that are exactly zero."""
    below_1e_9: int = 0
    """Entries with ``|η| < 1e-9``, zeros included."""
    below_1e_6: int = 0
    below_1e_3: int = 0
    l1: float = 0.0
    """``Σ_t |η_t|₁``."""
    l2_squared: float = 0.0
    """``Σ_t |η_t|₂²``."""
    shares: float = 0.0
    """``Σ_t |η_t|₁² / (F |η_t|₂²)``: the share of neurons that would have this gradient if it were equally
    large in some and zero in all others. Tokens whose η is zero have a share of 0."""


class EffectiveGradient(CallObserver):
    """Sums up :class:`EffectiveGradientSums` of one block, of whatever form.

    Raises:
        PatchError: experts.
        ValueError: from ``with``: ``p`` of a stock block cannot be watched (patching it with ``"original"``
            mends that).

    """

    values_at: ClassVar[tuple[Site, ...]] = ()
    gradients_at: ClassVar[tuple[Site, ...]] = ("p",)

    def __init__(self, block: Block) -> None:
        super().__init__(block)
        self._sums = EffectiveGradientSums()

    def result(self) -> EffectiveGradientSums:
        self.require_gradients()
        return self._sums

    def update_call(self, values: Mapping[Site, Tensor], gradients: Mapping[Site, Tensor]) -> None:
        for (eta,) in pieces(gradients["p"]):
            size = eta.float().abs()
            counts = [(size == 0).sum(-1), *((size < one).sum(-1) for one in (1e-9, 1e-6, 1e-3))]
            columns = [*(one.float() for one in counts), size.sum(-1), size.square().sum(-1)]
            zeros, nine, six, three, l1, l2_squared = torch.stack(columns).cpu().double()
            shares = l1.square() / (eta.shape[-1] * l2_squared)
            self._sums += EffectiveGradientSums(
                tokens=len(eta),
                zeros=int(zeros.sum()),
                below_1e_9=int(nine.sum()),
                below_1e_6=int(six.sum()),
                below_1e_3=int(three.sum()),
                l1=float(l1.sum()),
                l2_squared=float(l2_squared.sum()),
                shares=float(shares.masked_fill(l2_squared == 0, 0).sum()),
            )
