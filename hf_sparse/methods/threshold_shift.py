"""After training, small activations fall silent as well: ReLU becomes FATReLU, without retraining."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_sparse.activations import ActivationConfig
from hf_sparse.fields import require
from hf_sparse.methods.method import Acting, Method, Training

if TYPE_CHECKING:
    from hf_sparse.config import SparsityConfig

_FROM = ("relu", "fatrelu")


@dataclass(frozen=True, kw_only=True)
class ThresholdShift(Method):
    """The last stage of ProSparse (arXiv 2402.13516): ``p if p >= threshold else 0`` in the place of ReLU.

    The model that is evaluated last and saved has it; training is as without.
    """

    name = "threshold_shift"

    threshold: float = 0.01
    """In units of the pre-activation (published: 0.01, the largest before the average score fell)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        name = "methods.threshold_shift.threshold"
        require(self.threshold > 0, name, self.threshold, "it must be positive")

    def check(self, sparsity: SparsityConfig | None) -> None:
        found = None if sparsity is None else sparsity.activation.name
        if found not in _FROM:
            raise ValueError(
                f"methods.threshold_shift makes FATReLU of ReLU, but patch={found or 'none'}; leave it out, "
                "or patch with relu."
            )

    def attach(self, training: Training) -> Acting:
        return _Acting(training, ActivationConfig(name="fatrelu", threshold=self.threshold))


class _Acting(Acting):
    def __init__(self, training: Training, activation: ActivationConfig) -> None:
        self._model, self._activation = training.model, activation

    def finish(self) -> None:
        from hf_sparse.patching import set_activation

        set_activation(self._model, self._activation)
