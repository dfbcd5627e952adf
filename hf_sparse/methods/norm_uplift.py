"""The weights of the norms before the MLP blocks are lifted to 1 over the start of a finetune."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from hf_sparse.fields import require
from hf_sparse.methods.constrained import (
    FrozenBiases,
    require_changeable,
    require_patched,
    restricted_norms,
)
from hf_sparse.methods.method import Acting, Method, Training
from hf_sparse.norms import Norm
from hf_sparse.schedules import linear_mix

if TYPE_CHECKING:
    from hf_sparse.config import SparsityConfig


@dataclass(frozen=True, kw_only=True)
class NormUplift(Method):
    """Restricted LayerNorm or RMSNorm for finetuning (the code released with arXiv 2309.03004, 2605.25612).

    After update t, ``|w| <- max(|w|, min(t / (until * steps), 1))`` for the gain w of the norm before each
    patched block, its sign kept; 0 counts as positive. The biases of these norms are not trained.
    """

    name = "norm_uplift"

    until: float = 0.3
    """Fraction of the run over which the bound grows linearly to 1 (published: 3,000 of 10,000 updates)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            0 <= self.until <= 1, "methods.norm_uplift.until", self.until, "it must be a fraction, 0 to 1"
        )

    def check(self, sparsity: SparsityConfig | None) -> None:
        require_patched(sparsity, self.name)

    def attach(self, training: Training) -> Acting:
        return _Acting(restricted_norms(training.model, self.name), self.until * training.steps)


class _Acting(Acting):
    def __init__(self, norms: Sequence[Norm], steps: float) -> None:
        self._norms, self._steps = norms, steps
        self._biases = FrozenBiases(norms)
        self._bound = 0.0

    def before_step(self, step: int) -> None:
        self._bound = linear_mix(step, self._steps)

    def after_step(self, step: int) -> None:
        bound = linear_mix(step, self._steps)
        for norm in self._norms:
            weight = norm.weight
            assert weight is not None
            require_changeable(weight, NormUplift.name)
            gain = weight + norm.offset
            sign = 1 - 2 * (gain < 0).to(gain.dtype)
            weight.copy_(torch.where(gain.abs() < bound, sign * bound - norm.offset, weight))

    def values(self) -> dict[str, float]:
        return {"norm_bound": self._bound}

    def detach(self) -> None:
        self._biases.release()
