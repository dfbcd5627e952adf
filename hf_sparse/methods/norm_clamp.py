"""The norms before the MLP blocks have no bias and gains of at least 1, from the start of a training on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from hf_sparse.methods.constrained import (
    FrozenBiases,
    require_changeable,
    require_patched,
    restricted_norms,
)
from hf_sparse.methods.method import Acting, Method, Training
from hf_sparse.norms import Norm

if TYPE_CHECKING:
    from hf_sparse.config import SparsityConfig


@dataclass(frozen=True, kw_only=True)
class NormClamp(Method):
    """Restricted LayerNorm or RMSNorm for training from scratch (arXiv 2309.03004, 2605.25612).

    At the start and after each update ``w <- max(w, 1)`` for the gain w of the norm before each patched
    block; its bias is 0 and not trained.
    """

    name = "norm_clamp"
    excludes = ("norm_uplift",)

    def check(self, sparsity: SparsityConfig | None) -> None:
        require_patched(sparsity, self.name)

    def attach(self, training: Training) -> Acting:
        return _Acting(restricted_norms(training.model, self.name))


class _Acting(Acting):
    def __init__(self, norms: Sequence[Norm]) -> None:
        self._norms = norms
        self._biases = FrozenBiases(norms)

    @torch.no_grad()
    def before_step(self, step: int) -> None:
        self.after_step(step)  # does something before the first update only

    def after_step(self, step: int) -> None:
        for norm in self._norms:
            assert norm.weight is not None
            require_changeable(norm.weight, NormClamp.name)
            norm.weight.clamp_(min=1 - norm.offset)
            if norm.bias is not None:
                norm.bias.zero_()

    def detach(self) -> None:
        self._biases.release()
