"""FATReLU: a threshold in place of the zero of ReLU (ProSparse, arXiv 2402.13516, section 3.3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_sparse.activations import ActivationConfig
from hf_sparse.adapters import Block
from hf_sparse.calibration.magnitudes import Magnitudes, counted
from hf_sparse.calibration.method import Calibration
from hf_sparse.config import SparsityConfig
from hf_sparse.errors import PatchError
from hf_sparse.metrics.sparsity import ZeroCounter
from hf_sparse.observing import Observer

_RELU = ("relu", "fatrelu")


class Method(Calibration):
    """``a = p if p >= t else 0``, with a t for each block: the quantile of max(p, 0) at the level.

    Blocks whose ReLU silences more than that by itself keep t = 0. For models with ReLU, as they come or
    after a finetune.
    """

    counts = "exact zeros among the values that reach the down projections"

    def __init__(self, model: PreTrainedModel, blocks: Sequence[Block], start: SparsityConfig | None) -> None:
        super().__init__(model, blocks, start)
        for block in blocks:
            kind = None if start is None or not block.is_patched else start.activation.name
            native = type(block.original_activation) is nn.ReLU or (
                type(block.original_activation).__name__ == "ReLUActivation"
            )
            if kind not in _RELU and not (native and kind in (None, "original")):
                raise PatchError(
                    f"method='fatrelu' puts a threshold into ReLU, but {block.name} has "
                    f"{kind or type(block.original_activation).__name__}; choose another method, such as "
                    "'teal', or patch with \"relu\" and finetune first."
                )
        self._seen: list[Rectified] = []

    @property
    def base(self) -> SparsityConfig:
        return self._with(0.0)

    def observers(self, blocks: Sequence[Block]) -> list[Observer]:
        self._seen = [Rectified(block) for block in blocks]
        return list(self._seen)

    def config(self, level: float) -> SparsityConfig:
        return self._with(tuple(one.magnitudes.quantile(level) for one in self._seen))

    def expected(self, level: float) -> float:
        neurons = [one.block.intermediate_size for one in self._seen]
        silent = [max(level, one.magnitudes.at_most(0.0)) for one in self._seen]
        return sum(n * s for n, s in zip(neurons, silent, strict=True)) / sum(neurons)

    def counters(self, blocks: Sequence[Block]) -> list[Observer]:
        return [ZeroCounter(block) for block in blocks]

    def counted(self, counters: Sequence[Observer]) -> float:
        layers = [one.result() for one in cast(Sequence[ZeroCounter], counters)]
        return sum(one.zeros for one in layers) / sum(one.tokens * one.neurons for one in layers)

    def _with(self, threshold: float | tuple[float, ...]) -> SparsityConfig:
        activation = ActivationConfig(name="fatrelu", threshold=threshold)
        start = self.start or SparsityConfig()
        return start.changed(activation=activation)


class Rectified(Observer):
    """The magnitudes of max(p, 0) of one block."""

    site = "p"

    def __init__(self, block: Block) -> None:
        super().__init__(block)
        self.magnitudes = Magnitudes()

    def update(self, values: Tensor, routed: bool) -> None:
        self.magnitudes.add(counted(values.clamp(min=0)))
