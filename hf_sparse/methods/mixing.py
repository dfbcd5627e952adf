"""The original activation is mixed out while the new one is mixed in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_sparse.fields import require
from hf_sparse.methods.method import Acting, Method, Training
from hf_sparse.schedules import linear_mix

if TYPE_CHECKING:
    from hf_sparse.config import SparsityConfig


@dataclass(frozen=True, kw_only=True)
class Mixing(Method):
    """Activation mixing (arXiv 2605.25612, finetuning): ``(1 - k) * original(p) + k * new(p)``."""

    name = "mixing"
    acts_first = True

    until: float = 0.3
    """Fraction of the run over which k grows linearly to 1 (published: 3,000 of 10,000 updates)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.until <= 1, "methods.mixing.until", self.until, "it must be a fraction, 0 to 1")

    def check(self, sparsity: SparsityConfig | None) -> None:
        if sparsity is None:
            raise ValueError(
                "methods.mixing has no meaning with patch=none, the dense baseline; leave it out or choose "
                "an activation."
            )

    def attach(self, training: Training) -> Acting:
        return _Acting(training, self.until * training.steps)


class _Acting(Acting):
    def __init__(self, training: Training, steps: float) -> None:
        self._model, self._steps = training.model, steps
        self._mix = 1.0

    def before_step(self, step: int) -> None:
        from hf_sparse.patching import set_mix

        self._mix = linear_mix(step, self._steps)
        set_mix(self._model, self._mix)

    def values(self) -> dict[str, float]:
        return {"mix": self._mix}
