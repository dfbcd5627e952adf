"""The FFNs of a tiny model, found without hf_sparse: by the widths that only FFNs have.

An FFN is a module in a repeated layer with a weight from the hidden size to such a width (or to twice that:
gate and up in one) and one back. Where no single module has both, it is the smallest that contains both. All
experts of a layer that share a router are one FFN, stacked or in a list.
"""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from transformers import Conv1D, PreTrainedModel
from transformers.activations import ACT2CLS
from transformers.integrations import moe

from support.type_sizes import EXPERTS, FFN_WIDTHS, HIDDEN

_ACTIVATIONS = tuple({entry[0] if isinstance(entry, tuple) else entry for entry in ACT2CLS.values()})
_ONE_EXPERT = re.compile(r"(experts?)[._]\d+\b")


@dataclass(frozen=True)
class FFN:
    name: str
    """Qualified name of the module that has all of it; of the first, in a list of experts."""
    class_name: str
    shape: str
    """gated, fused (gate and up in one weight) or plain; experts of such a shape."""
    place: str
    """What is special about where it is and how it is run, of what can be seen; perhaps nothing."""
    weights: tuple[frozenset[str], ...]
    """For each expert of a list, otherwise once, the names of its weights."""

    def has(self, name: str) -> bool:
        """Whether a layer or parameter of that name is part of it."""
        return any(name in weights or f"{name}.weight" in weights for weights in self.weights)


@dataclass(frozen=True)
class _Weight:
    name: str
    owner: str
    width: int
    kind: str
    """down, up, or both halves; ``either`` if the shape of a stack leaves up and down open."""
    stacked: bool


def ffns(model: PreTrainedModel) -> list[FFN]:
    """The FFNs of a model that ``every_type`` built, in the order of its modules."""
    by_owner: dict[tuple[str, int], list[_Weight]] = {}
    for weight in _weights(model):
        by_owner.setdefault((weight.owner, weight.width), []).append(weight)
    whole = {key: group for key, group in by_owner.items() if _is_whole(group)}
    parts: dict[tuple[str, int], list[_Weight]] = {}
    for (owner, width), group in by_owner.items():
        if (owner, width) not in whole:
            parts.setdefault((_layer(owner), width), []).extend(group)
    for (_, width), group in parts.items():
        if _is_whole(group):
            whole[_common([weight.owner for weight in group]), width] = group
    merged: dict[tuple[str, int], dict[str, list[_Weight]]] = {}
    for (owner, width), group in whole.items():
        merged.setdefault((_ONE_EXPERT.sub(r"\1", owner), width), {})[owner] = group
    order = {name: index for index, (name, _) in enumerate(model.named_modules())}
    found = sorted(merged.values(), key=lambda groups: order[next(iter(groups))])
    return [_ffn(model, groups) for groups in found]


def _weights(model: nn.Module) -> Iterator[_Weight]:
    for owner, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            is_linear, stacked = isinstance(module, nn.Linear | Conv1D), parameter.dim() == 3
            place = owner.rpartition(".")[0] if is_linear else owner
            if parameter.dim() not in (2, 3) or not any(part.isdigit() for part in place.split(".")):
                continue
            first, last = parameter.shape[-2:]
            if isinstance(module, Conv1D):
                first, last = last, first
            sizes = {first, last}
            for width in FFN_WIDTHS:
                if sizes == {HIDDEN, width}:
                    kind = "either" if stacked else "down" if last == width else "up"
                elif sizes == {HIDDEN, 2 * width} and (stacked or last == HIDDEN):
                    kind = "both halves"
                elif not is_linear and tuple(parameter.shape) == (EXPERTS * width, HIDDEN):
                    kind, stacked = "either", True
                else:
                    continue
                if is_linear or stacked:
                    yield _Weight(f"{owner}.{name}", place, width, kind, stacked)


def _is_whole(group: list[_Weight]) -> bool:
    kinds = [weight.kind for weight in group]
    if any(weight.stacked for weight in group):
        return len(kinds) > 1 and "either" in kinds
    return "down" in kinds and len(set(kinds)) > 1


def _layer(owner: str) -> str:
    """The name up to its last number."""
    parts = owner.split(".")
    return ".".join(parts[: 1 + max(i for i, part in enumerate(parts) if part.isdigit())])


def _common(names: list[str]) -> str:
    """The name of the smallest module that contains all of these."""
    same = itertools.takewhile(
        lambda parts: len(set(parts)) == 1, zip(*(name.split(".") for name in names), strict=False)
    )
    return ".".join(parts[0] for parts in same)


def _ffn(model: nn.Module, groups: dict[str, list[_Weight]]) -> FFN:
    name, group = next(iter(groups.items()))
    owner = model.get_submodule(name)
    kinds = [weight.kind for weight in group]
    shape = "fused" if "both halves" in kinds else "gated" if len(kinds) > 2 else "plain"
    if len(groups) > 1 or group[0].stacked:
        shape = f"{shape} experts"
    return FFN(
        name=name,
        class_name=type(owner).__name__,
        shape=shape,
        place=_place(owner, name, group),
        weights=tuple(frozenset(weight.name for weight in one) for one in groups.values()),
    )


def _place(owner: nn.Module, name: str, group: list[_Weight]) -> str:
    if group[0].stacked:
        gate = getattr(type(owner), "_apply_gate", None)
        if gate is None:
            return "stacked, without the experts interface"
        if not getattr(owner, "has_gate", True):
            return "stacked, without a gate"
        return f"stacked, {'the default' if gate is moe._default_apply_gate else 'its own'} gate"
    if any(weight.owner != name for weight in group):
        return "split over several modules"
    linears = [child for child in owner.modules() if isinstance(child, nn.Linear | Conv1D)]
    if name.rpartition(".")[2].isdigit() and len(linears) > len(group):
        return "inlined in the layer"
    return _inside(owner)


def _inside(owner: nn.Module) -> str:
    """What a module of its own does that is not the plain formula, of what can be seen from outside."""
    if isinstance(owner, nn.Sequential):
        return "an nn.Sequential"
    activations = [child for child in owner.children() if isinstance(child, _ACTIVATIONS)]
    if not activations:
        return "activation in the forward"
    if any(next(activation.parameters(), None) is not None for activation in activations):
        return "activation with parameters"
    if any("Norm" in type(child).__name__ for child in owner.children()):
        return "norm inside"
    forward = type(owner).forward
    further = [
        argument
        for argument in list(inspect.signature(forward).parameters.values())[2:]
        if argument.kind is argument.POSITIONAL_OR_KEYWORD
    ]
    if further:
        return "forward with further arguments"
    linears = [name for name, child in owner.named_children() if isinstance(child, nn.Linear | Conv1D)]
    if not any(f"self.{name}(" in inspect.getsource(forward) for name in linears):
        return "work in other methods than forward"
    return ""
