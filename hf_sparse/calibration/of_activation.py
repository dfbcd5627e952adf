"""What methods have in common that put a threshold into the activation."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import cast

from torch import Tensor

from hf_sparse.activations import ActivationConfig
from hf_sparse.adapters import Block
from hf_sparse.adapters.experts import Experts
from hf_sparse.calibration.magnitudes import Magnitudes, counted, require_finite
from hf_sparse.calibration.method import Calibration
from hf_sparse.calibration.weights import in_layers, of_neuron, of_silent_neuron
from hf_sparse.config import SparsityConfig
from hf_sparse.metrics.sparsity import ZeroCounter
from hf_sparse.modules import sparse_part
from hf_sparse.observing import BlockObserver, Observer


class OfActivation(Calibration):
    """A threshold for each block: the quantile, at the level, of what its :class:`Values` sees.

    Blocks that silence more than that by themselves keep 0.
    """

    counts = "exact zeros among the values that reach the down projections"
    _seen: list[Values]

    @property
    @abstractmethod
    def name(self) -> str:
        """Of the activation."""

    @abstractmethod
    def values(self, block: Block) -> Values:
        """What looks at the values of ``block`` that the threshold is for."""

    @property
    def base(self) -> SparsityConfig:
        return self._with(0.0)

    def observers(self, blocks: Sequence[Block]) -> list[BlockObserver]:
        self._seen = [self.values(block) for block in blocks]
        return list(self._seen)

    def config(self, level: float) -> SparsityConfig:
        return self._with(tuple(one.magnitudes.quantile(level) for one in self._seen))

    def expected(self, level: float) -> float:
        neurons = [one.block.intermediate_size for one in self._seen]
        return sum(n * s for n, s in zip(neurons, self._silent(level), strict=True)) / sum(neurons)

    def counters(self, blocks: Sequence[Block]) -> list[BlockObserver]:
        return [ZeroCounter(block) for block in blocks]

    def counted(self, counters: Sequence[BlockObserver]) -> float:
        layers = [one.result() for one in cast(Sequence[ZeroCounter], counters)]
        return sum(one.zeros for one in layers) / sum(one.tokens * one.neurons for one in layers)

    def reach(self, tokens: int) -> float:
        every: float = in_layers(self.model, self.blocks)
        silent = 0.0
        for one in self._seen:
            neurons: float = one.block.intermediate_size
            if isinstance(one.block.roles, Experts):  # as many as tokens are routed to
                neurons = one.magnitudes.total / tokens
                every += neurons * of_neuron(one.block)
            silent += neurons * of_silent_neuron(one.block)
        return silent / every

    def settle(self, level: float) -> None:
        for block, silent in zip(self.blocks, self._silent(level), strict=True):
            part = sparse_part(block.module)
            assert part is not None
            part.density = 1 - silent

    def _silent(self, level: float) -> list[float]:
        return [max(level, one.magnitudes.at_most(0.0)) for one in self._seen]

    def _with(self, threshold: float | tuple[float, ...]) -> SparsityConfig:
        activation = ActivationConfig(name=self.name, threshold=threshold)
        return (self.start or SparsityConfig()).changed(activation=activation)


class Values(Observer):
    """The magnitudes of the values at a site of one block."""

    def __init__(self, block: Block) -> None:
        super().__init__(block)
        self.magnitudes = Magnitudes()

    def update(self, values: Tensor, routed: bool) -> None:
        self.magnitudes.add(require_finite(counted(values), f"the activation of {self.block.name}"))
