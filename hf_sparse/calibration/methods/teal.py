"""TEAL: thresholds on the inputs of all linear layers (arXiv 2408.14690)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import cast

from torch import nn
from transformers import PreTrainedModel

from hf_sparse.adapters import Block
from hf_sparse.adapters.bottleneck import layer_of
from hf_sparse.adapters.copies import in_use, place
from hf_sparse.adapters.roles import input_threshold, linear_size
from hf_sparse.calibration.greedy import LayerInputs, at, path
from hf_sparse.calibration.input_magnitudes import InputMagnitudes, Shared
from hf_sparse.calibration.method import Calibration
from hf_sparse.config import SparsityConfig
from hf_sparse.errors import PatchError
from hf_sparse.inputs import linear_places
from hf_sparse.modules.sparse_linear import SparseLinear
from hf_sparse.observing import BlockObserver
from hf_sparse.observing.running import observed


class Method(Calibration):
    """``x_j`` is taken for zero where ``|x_j| <= t``, with a t for each linear layer (equation 2).

    t is a quantile of ``|x|``. With the uniform allocation it is the same in every layer and projection; with
    the greedy one every layer has the same sparsity, and in it those projections are pruned more whose
    pruning changes the output of the layer less. Sparsity is the share of the weights that need not be read.
    """

    allocations = ("uniform", "greedy")

    counts = "the weights of all linear layers of attention and MLP that meet an input of zero"

    def __init__(self, model: PreTrainedModel, blocks: Sequence[Block], start: SparsityConfig | None) -> None:
        super().__init__(model, blocks, start)
        self._names = _linear_names(model, blocks)
        self._seen: list[list[InputMagnitudes]] = []
        self._layers: list[LayerInputs] = []
        self._paths: list[list[tuple[float, tuple[float, ...]]]] = []

    @property
    def base(self) -> SparsityConfig:
        plain = SparsityConfig(activation="original")
        return plain if self.start is None else self.start.changed(inputs=None)

    def observers(self, blocks: Sequence[Block]) -> list[BlockObserver]:
        self._seen = self._observers(blocks)
        found: list[BlockObserver] = [one for layer in self._seen for one in layer]
        if self.allocation == "greedy":
            self._layers = [LayerInputs(b, self.model.get_submodule(layer_of(b.name))) for b in blocks]
        return [*found, *self._layers]

    def finish(self, most: float) -> None:
        for layer, inputs in zip(self._layers, self._seen, strict=False):
            linears = [one.linear for one in inputs]
            with observed(self.model):
                self._paths.append(path(layer, linears, [one.magnitudes.quantile for one in inputs], most))
            layer.call = None

    def config(self, level: float) -> SparsityConfig:
        shares = self._shares(level)
        inputs = {
            name: tuple(
                layer[i].magnitudes.quantile(own[i]) for layer, own in zip(self._seen, shares, strict=True)
            )
            for i, name in enumerate(self._names)
        }
        return self.base.changed(inputs=inputs)

    def expected(self, level: float) -> float:
        pairs = zip(chain(*self._seen), chain(*self._shares(level)), strict=True)
        return _by_size((one, max(share, one.magnitudes.at_most(0.0))) for one, share in pairs)

    def _shares(self, level: float) -> list[tuple[float, ...]]:
        """By layer, the share that is pruned of each linear layer's input."""
        return [at(one, level) for one in self._paths] or [(level,) * len(self._names)] * len(self._seen)

    def counters(self, blocks: Sequence[Block]) -> list[BlockObserver]:
        return [one for layer in self._observers(blocks) for one in layer]

    def counted(self, counters: Sequence[BlockObserver]) -> float:
        return _by_size((one, one.pruned) for one in cast(Sequence[InputMagnitudes], counters))

    def settle(self, level: float) -> None:
        for block, seen in zip(self.blocks, self._seen, strict=True):
            for (_, linear), one in zip(_linears(self.model, block, self._names), seen, strict=True):
                if isinstance(linear, SparseLinear):
                    linear.density = 1 - one.magnitudes.at_most(input_threshold(linear))

    def _observers(self, blocks: Sequence[Block]) -> list[list[InputMagnitudes]]:
        found = []
        for block in blocks:
            shared = Shared()
            layer = _linears(self.model, block, self._names)
            found.append([InputMagnitudes(block, linear, shared) for _, linear in layer])
        return found


def _by_size(shares: Iterable[tuple[InputMagnitudes, float]]) -> float:
    """The mean of shares, weighted by the weights of the layers that they are of."""
    each = [(one.size, share) for one, share in shares]
    return sum(size * share for size, share in each) / sum(size for size, _ in each)


def _linear_names(model: PreTrainedModel, blocks: Sequence[Block]) -> list[str]:
    """The names, in its layer, of every linear layer; the same in all layers.

    Raises:
        PatchError: layers differ.

    """
    first: list[str] | None = None
    names: list[str]
    for block in blocks:
        layer = model.get_submodule(layer_of(block.name))
        names = []
        for name, one in in_use(layer):
            if type(one) in (nn.Linear, SparseLinear):
                if "lora_" not in name:
                    names.append(place(f".{name}").removeprefix("."))
            elif linear_size(one) is not None and "base_layer" not in one._modules:
                raise PatchError(
                    f"TEAL is for nn.Linear, and {layer_of(block.name)}.{name} is a {type(one).__name__}; "
                    "choose another method, or patch with inputs= of your own."
                )
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
    used = {one for _, one in in_use(layer)}
    for name in names:
        for owner, key in linear_places(layer, name, layer_of(block.name)):
            if owner._modules[key] in used:
                found.append((name, cast(nn.Linear, owner._modules[key])))
    return found
