"""Thresholds on the inputs of linear layers, of MLP and attention alike."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from hf_sparse.adapters.block import replaced_forward
from hf_sparse.adapters.bottleneck import layer_of
from hf_sparse.adapters.copies import copies
from hf_sparse.adapters.experts import Experts
from hf_sparse.adapters.pruning import Pruning
from hf_sparse.adapters.walk import modules_of
from hf_sparse.checks import mapping, shown
from hf_sparse.errors import PatchError
from hf_sparse.modules.decoding_linear import is_linear
from hf_sparse.modules.sparse_block import SparseBlock
from hf_sparse.modules.sparse_linear import SparseLinear
from hf_sparse.parts import Part
from hf_sparse.pruned_input import PrunedInput

if TYPE_CHECKING:
    from hf_sparse.adapters import Block

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z0-9_]+)*", re.ASCII)
_LONGEST = 200


@dataclass(frozen=True)
class InputsConfig(Part):
    """``inputs``: values of the input of a linear layer that are taken for zero, or for a constant.

    A layer with threshold t computes ``W s(x) + b`` with ``s(x)_j = x_j if |x_j| > t else 0``, and skips the
    columns of W for which that is zero (TEAL, arXiv 2408.14690). Any ``nn.Linear`` in the layers whose MLP
    blocks are patched can have one, those of attention too. They are given by their names in a layer::

        SparsityConfig(activation="original", inputs={"self_attn.q_proj": 0.1, "mlp.down_proj": [0.02, 0.05]})

    A threshold is one number, in units of the input, or one per patched block, in their order. It holds for
    every token, in the prompt as well; at 0 there is none. Instead of the number there can be a mapping::

        inputs={"mlp.down_proj": {"threshold": [0.02, 0.05], "center": -0.17}}
        inputs={"mlp.down_proj": {"threshold": 0.1, "weighted": True}}

    ============  ===========================================================================================
    threshold     as above; of the score
    center        one number or one per patched block, default 0: what is left out is taken for this, and the
                  score is the distance to it (SCAP, arXiv 2412.07174)
    weighted      whether the score is multiplied by the Euclidean norm of its column of W, as W is in that
                  call (WINA, arXiv 2505.19427); default False
    ============  ===========================================================================================

    Raises:
        ValueError: a name or value is none; the message names it and the mend.

    """

    linears: tuple[tuple[str, PrunedInput], ...]
    """Names of linear layers, in their order, and what each leaves out."""

    @classmethod
    def read(cls, value: Any) -> InputsConfig:
        if isinstance(value, cls):
            return value
        given = mapping("inputs", value)
        if not given:
            raise ValueError('inputs={} names no layer; give {"self_attn.q_proj": 0.1}, or leave it out.')
        found = []
        for name, threshold in sorted(given.items()):
            if len(name) > _LONGEST or not _NAME.fullmatch(name):
                raise ValueError(
                    f"inputs has the field {shown(name)}, which is no name of a module in a layer."
                )
            found.append((name, PrunedInput.read(f"inputs[{name!r}]", threshold)))
        lengths = {length for _, each in found for length in each.lengths}
        if len(lengths) > 1:
            raise ValueError(
                f"inputs has thresholds for {' and '.join(map(str, sorted(lengths)))} blocks; give one "
                "number, or one per patched block."
            )
        return cls(tuple(found))

    def to_dict(self) -> dict[str, Any]:
        return {name: each.to_plain() for name, each in self.linears}

    @property
    def blocks(self) -> int | None:
        return next((length for _, each in self.linears for length in each.lengths), None)

    def arranged(self, order: Sequence[int]) -> InputsConfig:
        return InputsConfig(tuple((name, each.arranged(order)) for name, each in self.linears))

    def check(self, block: Block) -> None:
        if isinstance(block.roles, Experts):
            raise PatchError(
                f"inputs are for linear layers, but {block.name} ({block.stock_class.__name__}) has stacked "
                "experts; leave inputs out."
            )

    def at(self, index: int) -> Mapping[str, Pruning]:
        """What linear layers leave out in the layer of the ``index``-th patched block."""
        return {name: each.at(index) for name, each in self.linears}

    def outside(
        self, model: nn.Module, chosen: Sequence[Block], blocks: Sequence[Block]
    ) -> list[Callable[[], None]]:
        changes: list[Callable[[], None]] = []
        for index, layer in enumerate(_layers(chosen)):
            within = model.get_submodule(layer)
            for name, pruning in self.at(index).items():
                for place in linear_places(within, name, layer):
                    _require_linear(*place, f"{layer}.{name}")
                changes.append(partial(_put, within, name, layer, pruning))
        return changes

    @classmethod
    def undoing(cls, model: nn.Module, blocks: Sequence[Block]) -> list[Callable[[], None]]:
        layers = [model.get_submodule(name) for name in dict.fromkeys(layer_of(b.name) for b in blocks)]
        found = [layer for layer in layers if any(True for _ in thresholded(layer))]
        for layer in found:
            for owner, name in thresholded(layer):
                if (by := replaced_forward(pruned(owner, name))) is not None:
                    raise PatchError(
                        f"the forward of {name}, which has a threshold on its input, was replaced by {by}; "
                        "take that back first."
                    )
                if type(owner._modules[name]) is not SparseLinear:
                    raise PatchError(
                        f"{name} has a threshold on its input, and its parameters are parametrised, or "
                        "sharded by themselves; remove that first."
                    )
        return [partial(_take_away, layer) for layer in found]

    def confirm(self, model: nn.Module, chosen: Sequence[Block], blocks: Sequence[Block]) -> None:
        expected: dict[int, Pruning] = {}
        for index, layer in enumerate(_layers(chosen)):
            within = model.get_submodule(layer)
            for name, pruning in self.at(index).items():
                for owner, key in linear_places(within, name, layer):
                    expected[id(owner._modules[key])] = pruning
        found: dict[int, Pruning | None] = {}
        for layer in dict.fromkeys(layer_of(block.name) for block in blocks):
            for owner, key in thresholded(model.get_submodule(layer)):
                one = pruned(owner, key)
                found[id(one)] = one.pruning
        if {k: v for k, v in expected.items() if v.threshold} != found:
            raise PatchError(
                f"the config says thresholds on the inputs of {len(expected)} linear layers, and those of "
                f"the model are others ({len(found)} have one); patch the model again."
            )


def linear_places(layer: nn.Module, name: str, path: str) -> list[tuple[nn.Module, str]]:
    """Owner and name there of the linear layer ``name`` of ``layer``, also under an adapter.

    Raises:
        PatchError: there is no module of that name.

    """
    *inner, last = name.split(".")
    owner: Any = layer
    for part in inner:
        owner = owner._modules.get(part) if owner is not None else None
        while owner is not None and owner._modules.get("base_layer") is not None:
            owner = owner._modules["base_layer"]
    child = None if owner is None else owner._modules.get(last)
    if child is None:
        linears = [key for key, one in layer.named_modules() if isinstance(one, nn.Linear)]
        raise PatchError(
            f"inputs names {name!r}, and {path} has no such module; its linear layers are "
            f"{', '.join(linears)}."
        )
    return [_under_adapters(*one) for one in copies(owner, last)]


def _under_adapters(owner: nn.Module, name: str) -> tuple[nn.Module, str]:
    child = owner._modules[name]
    while child is not None and (base := child._modules.get("base_layer")) is not None:
        owner, name, child = child, "base_layer", base
    return owner, name


def thresholded(layer: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Owner and name there of each linear layer in ``layer`` with a threshold on its input."""
    for owner in modules_of(layer):
        for name, child in owner._modules.items():
            if isinstance(child, SparseLinear) and child.pruning is not None:
                yield owner, name


def named_thresholded(model: nn.Module) -> Iterator[tuple[str, SparseLinear]]:
    """Qualified name and layer of each in ``model``; found without a module disclosing anything."""
    todo: list[tuple[str, nn.Module]] = [("", model)]
    seen: set[nn.Module] = set()
    while todo:
        name, module = todo.pop()
        if module in seen:
            continue
        seen.add(module)
        if isinstance(module, SparseLinear) and module.pruning is not None:
            yield name, module
        prefix = f"{name}." if name else ""
        children = [(prefix + key, child) for key, child in module._modules.items() if child is not None]
        todo += reversed(children)


def pruned(owner: nn.Module, name: str) -> SparseLinear:
    """One of those that :func:`thresholded` gives."""
    return cast(SparseLinear, owner._modules[name])


def _layers(chosen: Sequence[Block]) -> list[str]:
    """The layer of each block.

    Raises:
        PatchError: two blocks are in one layer.

    """
    found: dict[str, str] = {}
    for block in chosen:
        layer = layer_of(block.name)
        if layer in found or layer == block.name:
            raise PatchError(
                f"inputs are named by layers, and {block.name} "
                + (f"and {found[layer]} are in the same" if layer in found else "is in none")
                + "; leave inputs out, or select one block of each layer (layers=, exclude=)."
            )
        found[layer] = block.name
    return list(found)


def _require_linear(owner: nn.Module, name: str, path: str) -> None:
    child = owner._modules[name]
    if is_linear(child) or (type(child) is SparseLinear and child.pruning is not None):
        if (by := replaced_forward(child)) is not None:
            raise PatchError(
                f"inputs names {path}, whose forward was replaced by {by}; take that back, or {path} out."
            )
        return
    raise PatchError(
        f"inputs names {path}, which is a {type(child).__name__} and no nn.Linear; take it out of inputs."
    )


def _put(layer: nn.Module, name: str, path: str, pruning: Pruning) -> None:
    for owner, key in linear_places(layer, name, path):
        stock = owner._modules[key]
        assert isinstance(stock, nn.Linear)
        if pruning.threshold:
            _exchange(owner, key, SparseLinear(stock, gives_zeros=True, pruning=pruning))


def _take_away(layer: nn.Module) -> None:
    for owner, name in list(thresholded(layer)):
        _exchange(owner, name, pruned(owner, name).restore())


def _exchange(owner: nn.Module, name: str, new: nn.Module) -> None:
    """Put ``new`` into ``owner``, and into the stock block that it stands for.

    Who else holds a linear layer could change it unnoticed, so that its weight would not be lent.
    """
    owner._modules[name] = new
    if isinstance(owner, SparseBlock):
        owner.in_stock(name, new)
