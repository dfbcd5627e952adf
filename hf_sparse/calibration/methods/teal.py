"""TEAL: thresholds on the inputs of all linear layers (arXiv 2408.14690)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_sparse.adapters import Block
from hf_sparse.adapters.bottleneck import layer_of
from hf_sparse.calibration.magnitudes import Magnitudes, counted
from hf_sparse.calibration.method import Calibration
from hf_sparse.config import SparsityConfig
from hf_sparse.errors import PatchError
from hf_sparse.inputs import linear_places
from hf_sparse.modules.sparse_linear import SparseLinear
from hf_sparse.observing import Observer


class Method(Calibration):
    """``x_j`` is taken for zero where ``|x_j| <= t``, with a t for each linear layer (equation 2).

    t is the quantile of ``|x|`` at the level: the same in every layer and projection, TEAL's uniform
    allocation. Sparsity is the share of the weights of these layers that need not be read.
    """

    counts = "the weights of all linear layers of attention and MLP that meet an input of zero"

    def __init__(self, model: PreTrainedModel, blocks: Sequence[Block], start: SparsityConfig | None) -> None:
        super().__init__(model, blocks, start)
        self._names = _linear_names(model, blocks)
        self._seen: list[list[InputMagnitudes]] = []

    @property
    def base(self) -> SparsityConfig:
        plain = SparsityConfig(activation="original")
        return plain if self.start is None else self.start.changed(inputs=None)

    def observers(self, blocks: Sequence[Block]) -> list[Observer]:
        self._seen = self._observers(blocks)
        return [one for layer in self._seen for one in layer]

    def config(self, level: float) -> SparsityConfig:
        inputs = {
            name: tuple(layer[i].magnitudes.quantile(level) for layer in self._seen)
            for i, name in enumerate(self._names)
        }
        return self.base.changed(inputs=inputs)

    def expected(self, level: float) -> float:
        return level

    def counters(self, blocks: Sequence[Block]) -> list[Observer]:
        return [one for layer in self._observers(blocks) for one in layer]

    def counted(self, counters: Sequence[Observer]) -> float:
        read = unread = 0.0
        for one in cast(Sequence[InputMagnitudes], counters):
            size = one.linear.in_features * one.linear.out_features
            unread += size * one.magnitudes.at_most(getattr(one.linear, "threshold", 0.0))
            read += size
        return unread / read

    def settle(self, level: float) -> None:
        for block in self.blocks:
            for _, linear in _linears(self.model, block, self._names):
                if isinstance(linear, SparseLinear):
                    linear.density = 1 - level

    def _observers(self, blocks: Sequence[Block]) -> list[list[InputMagnitudes]]:
        found = []
        for block in blocks:
            shared = _Shared()
            layer = _linears(self.model, block, self._names)
            found.append([InputMagnitudes(block, linear, shared) for _, linear in layer])
        return found


class InputMagnitudes(Observer):
    """The magnitudes of the input of one linear layer, before its threshold."""

    def __init__(self, block: Block, linear: nn.Linear, shared: _Shared) -> None:
        super().__init__(block)
        self.linear = linear
        self.magnitudes = Magnitudes()
        self._shared = shared

    def __enter__(self) -> InputMagnitudes:
        self._handle = self.linear.register_forward_pre_hook(self._given)
        return self

    def _given(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._shared.of(args[0], self)

    def update(self, values: Tensor, routed: bool) -> None:
        self._shared.counts = counted(values)


class _Shared:
    """Counts of the last input of a layer: several linear layers are given the same tensor."""

    def __init__(self) -> None:
        self._last: Tensor | None = None
        self.counts = torch.zeros(0)

    def of(self, values: Tensor, one: InputMagnitudes) -> None:
        if values is not self._last:
            self._last = values
            one._see(values, None)
        one.magnitudes.add(self.counts)


def _linear_names(model: PreTrainedModel, blocks: Sequence[Block]) -> list[str]:
    """The names, in its layer, of every linear layer; the same in all layers.

    Raises:
        PatchError: layers differ.

    """
    first: list[str] | None = None
    for block in blocks:
        layer = model.get_submodule(layer_of(block.name))
        names = [
            name.removesuffix(".base_layer")
            for name, one in layer.named_modules()
            if type(one) is nn.Linear or type(one) is SparseLinear
            if "lora_" not in name
        ]
        if first is not None and names != first:
            raise PatchError(
                f"TEAL wants the same linear layers in every layer, and {layer_of(block.name)} has "
                f"{', '.join(names)} where {layer_of(blocks[0].name)} has {', '.join(first)}; patch with "
                "inputs= and layers= of your own."
            )
        first = names
    return first or []


def _linears(model: PreTrainedModel, block: Block, names: Sequence[str]) -> list[tuple[str, nn.Linear]]:
    layer = model.get_submodule(layer_of(block.name))
    found = []
    for name in names:
        ((owner, key),) = linear_places(layer, name, layer_of(block.name))
        found.append((name, cast(nn.Linear, owner._modules[key])))
    return found
