"""What methods have in common that leave out a part of the inputs of linear layers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any, ClassVar, cast

from torch import nn
from transformers import PreTrainedModel

from hf_sparse.adapters import Block
from hf_sparse.adapters.bottleneck import layer_of
from hf_sparse.adapters.copies import in_use, place
from hf_sparse.adapters.experts import Experts
from hf_sparse.adapters.roles import linear_size
from hf_sparse.calibration.greedy import LayerInputs, at, path
from hf_sparse.calibration.input_values import InputValues, Shared, tell_densities
from hf_sparse.calibration.method import Calibration
from hf_sparse.calibration.weights import in_layers
from hf_sparse.config import SparsityConfig
from hf_sparse.errors import PatchError
from hf_sparse.inputs import linear_places
from hf_sparse.modules.decoding_linear import is_linear
from hf_sparse.modules.sparse_linear import SparseLinear
from hf_sparse.observing import BlockObserver
from hf_sparse.observing.running import observed


class OfInputs(Calibration):
    """A pruning for each linear layer: that which leaves out a share of what its :class:`InputValues` saw.

    With the uniform allocation the share is the same in every layer and projection; with the greedy one every
    layer has the same sparsity, and in it those projections are pruned more whose pruning changes the output
    of the layer less. Sparsity is the share of the weights that need not be read.
    """

    allocations: ClassVar[tuple[str, ...]] = ("uniform", "greedy")

    counts = "the weights of all linear layers of attention and MLP that meet an input of zero"

    seen_by: ClassVar[type[InputValues]]
    """What looks at the input of a linear layer."""

    mlp_alone: ClassVar[bool] = False
    """Whether attention is left as it is."""

    def __init__(self, model: PreTrainedModel, blocks: Sequence[Block], start: SparsityConfig | None) -> None:
        super().__init__(model, blocks, start)
        self._names = _linear_names(type(self).__module__.rpartition(".")[2], model, blocks, self.mlp_alone)
        self._seen: list[list[InputValues]] = []
        self._layers: list[LayerInputs] = []
        self._paths: list[list[tuple[float, tuple[float, ...]]]] = []

    @property
    def base(self) -> SparsityConfig:
        """With what linear layers leave out that this method does not choose for."""
        if self.start is None:
            return SparsityConfig(activation="original")
        return self.start.changed(inputs=self._others() or None)

    def _others(self) -> dict[str, Any]:
        inputs = None if self.start is None else self.start.parts.get("inputs")
        given: dict[str, Any] = {} if inputs is None else inputs.to_dict()
        return {name: value for name, value in given.items() if name not in self._names}

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
                prunings = [one.pruning for one in inputs]
                self._paths.append(path(layer, linears, prunings, [one.norms for one in inputs], most))
            layer.call = None

    def config(self, level: float) -> SparsityConfig:
        shares = self._shares(level)
        inputs = self._others()
        for i, name in enumerate(self._names):
            each = [layer[i].pruning(own[i]) for layer, own in zip(self._seen, shares, strict=True)]
            inputs[name] = {
                "threshold": tuple(one.threshold for one in each),
                "center": tuple(one.center for one in each),
                "weighted": each[0].weighted,
            }
        return self.base.changed(inputs=inputs)

    def expected(self, level: float) -> float:
        pairs = zip(chain(*self._seen), chain(*self._shares(level)), strict=True)
        return _by_size((one, max(share, one.left_out(one.pruning(0.0)))) for one, share in pairs)

    def _shares(self, level: float) -> list[tuple[float, ...]]:
        """By layer, the share that is pruned of each linear layer's input."""
        return [at(one, level) for one in self._paths] or [(level,) * len(self._names)] * len(self._seen)

    def counters(self, blocks: Sequence[Block]) -> list[BlockObserver]:
        return [one for layer in self._observers(blocks) for one in layer]

    def counted(self, counters: Sequence[BlockObserver]) -> float:
        return _by_size((one, one.pruned) for one in cast(Sequence[InputValues], counters))

    def reach(self, tokens: int) -> float:
        return sum(one.size for one in chain(*self._seen)) / in_layers(self.model, self.blocks)

    def settle(self, level: float) -> None:
        for block, seen in zip(self.blocks, self._seen, strict=True):
            for (_, linear), one in zip(_linears(self.model, block, self._names), seen, strict=True):
                one.linear = linear
            tell_densities(seen)

    def _observers(self, blocks: Sequence[Block]) -> list[list[InputValues]]:
        found = []
        for block in blocks:
            shared = Shared()
            layer = _linears(self.model, block, self._names)
            found.append([self.seen_by(block, linear, shared) for _, linear in layer])
        return found


def _by_size(shares: Iterable[tuple[InputValues, float]]) -> float:
    """The mean of shares, weighted by the weights of the layers that they are of."""
    each = [(one.size, share) for one, share in shares]
    return sum(size * share for size, share in each) / sum(size for size, _ in each)


def _linear_names(method: str, model: PreTrainedModel, blocks: Sequence[Block], mlp_alone: bool) -> list[str]:
    """The names, in its layer, of every linear layer, or of those of the MLP; the same in all layers.

    Raises:
        PatchError: layers differ, or have something else than linear layers, or blocks that stay their own.

    """
    first: list[str] | None = None
    names: list[str]
    for block in blocks:
        if isinstance(block.roles, Experts):
            raise PatchError(
                f"method={method!r} is for linear layers, and {block.name} ({block.stock_class.__name__}) "
                "has stacked experts; choose another method."
            )
        if block.stays:
            raise PatchError(
                f"method={method!r} is for MLP blocks that a patch replaces, and {block.name} stays a "
                f"{block.stock_class.__name__}; choose another method."
            )
        layer = model.get_submodule(layer_of(block.name))
        within = f"{block.name}.".removeprefix(f"{layer_of(block.name)}.") if mlp_alone else ""
        names = []
        for name, one in in_use(layer):
            if not name.startswith(within):
                continue
            if is_linear(one) or type(one) is SparseLinear:
                if "lora_" not in name:
                    names.append(place(f".{name}").removeprefix("."))
            elif linear_size(one) is not None and "base_layer" not in one._modules:
                raise PatchError(
                    f"method={method!r} is for nn.Linear, and {layer_of(block.name)}.{name} is a "
                    f"{type(one).__name__}; choose another method, or patch with inputs= of your own."
                )
        if first is not None and names != first:
            raise PatchError(
                f"method={method!r} wants the same linear layers in every layer, and {layer_of(block.name)} "
                f"has {', '.join(names)} where {layer_of(blocks[0].name)} has {', '.join(first)}; patch with "
                "inputs= and layers= of your own."
            )
        first = names
    if not first:
        raise PatchError(
            f"method={method!r} is for linear layers, and {blocks[0].name} has none, or some of another "
            "kind; choose another method."
        )
    return first


def _linears(model: PreTrainedModel, block: Block, names: Sequence[str]) -> list[tuple[str, nn.Linear]]:
    layer = model.get_submodule(layer_of(block.name))
    found = []
    used = {one for _, one in in_use(layer)}
    for name in names:
        for owner, key in linear_places(layer, name, layer_of(block.name)):
            if owner._modules[key] in used:
                found.append((name, cast(nn.Linear, owner._modules[key])))
    return found
