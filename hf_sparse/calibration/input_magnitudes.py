"""The magnitudes of what linear layers are given."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_sparse.adapters import Block
from hf_sparse.adapters.bottleneck import layer_of
from hf_sparse.adapters.roles import input_threshold
from hf_sparse.calibration.magnitudes import Magnitudes, counted
from hf_sparse.inputs import named_thresholded
from hf_sparse.modules.sparse_linear import SparseLinear
from hf_sparse.observing import Observer, blocks_of


class InputMagnitudes(Observer):
    """The magnitudes of the input of one linear layer, before its threshold."""

    def __init__(self, block: Block, linear: nn.Linear, shared: Shared) -> None:
        super().__init__(block)
        self.linear = linear
        self.magnitudes = Magnitudes()
        self._shared = shared

    @property
    def size(self) -> int:
        """How many weights the layer has."""
        return self.linear.in_features * self.linear.out_features

    @property
    def pruned(self) -> float:
        """The share of what it saw that the layer takes for zero now."""
        return self.magnitudes.at_most(input_threshold(self.linear))

    def _watch(self) -> Iterator[RemovableHandle]:
        yield self.linear.register_forward_pre_hook(self._given)

    def _given(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._shared.of(args[0], self)

    def update(self, values: Tensor, routed: bool) -> None:
        self._shared.counts = counted(values)


class Shared:
    """Counts of the last input of a layer: several linear layers are given the same tensor."""

    def __init__(self) -> None:
        self._last: Tensor | None = None
        self.counts = torch.zeros(0)

    def of(self, values: Tensor, one: InputMagnitudes) -> None:
        if values is not self._last:
            self._last = values
            one._see(values, None)
        one.magnitudes.add(self.counts)


def of_thresholded(model: nn.Module) -> list[InputMagnitudes]:
    """New ones, of the linear layers of ``model`` that have a threshold."""
    layers = {layer_of(block.name): block for block in blocks_of(model)}
    shared = {name: Shared() for name in layers}
    return [
        InputMagnitudes(layers[layer_of(name)], linear, shared[layer_of(name)])
        for name, linear in named_thresholded(model)
    ]


def tell_densities(seen: Iterable[InputMagnitudes]) -> None:
    """Let each linear layer with a threshold know which share of its inputs is above it."""
    for one in seen:
        # One that saw nothing is in a part that sees no text.
        if isinstance(one.linear, SparseLinear) and one.magnitudes.total:
            one.linear.density = 1 - one.pruned
