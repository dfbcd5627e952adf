"""The magnitudes of what linear layers are given."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from hf_sparse.adapters import Block
from hf_sparse.adapters.bottleneck import layer_of
from hf_sparse.adapters.roles import input_threshold
from hf_sparse.calibration.magnitudes import Magnitudes, counted
from hf_sparse.inputs import named_thresholded
from hf_sparse.modules.sparse_linear import SparseLinear
from hf_sparse.observing import Observer, blocks_of, observe


class InputMagnitudes(Observer):
    """The magnitudes of the input of one linear layer, before its threshold."""

    def __init__(self, block: Block, linear: nn.Linear, shared: Shared) -> None:
        super().__init__(block)
        self.linear = linear
        self.magnitudes = Magnitudes()
        self._shared = shared

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


def measure_inputs(model: PreTrainedModel, data: Iterable[Any], **options: Any) -> None:
    """Let each linear layer with a threshold on its input know which share of that is above it.

    Nothing happens without such layers. ``data`` and ``options`` as of :func:`hf_sparse.observing.observe`.
    """
    layers = {layer_of(block.name): block for block in blocks_of(model)}
    shared = {name: Shared() for name in layers}
    seen = [
        InputMagnitudes(layers[layer_of(name)], linear, shared[layer_of(name)])
        for name, linear in named_thresholded(model)
    ]
    if not seen:
        return
    observe(model, data, seen, **options)
    for one in seen:
        assert isinstance(one.linear, SparseLinear)
        if one.magnitudes.total:  # else it is in a part that sees no text
            one.linear.density = 1 - one.magnitudes.at_most(input_threshold(one.linear))
