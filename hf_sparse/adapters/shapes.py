"""Which shape of MLP a module has, of those that are known."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import nn

from hf_sparse.adapters import experts, probe_experts
from hf_sparse.adapters.experts import Experts
from hf_sparse.adapters.fused import Fused
from hf_sparse.adapters.gated import Gated
from hf_sparse.adapters.kept import Kept
from hf_sparse.adapters.plain import Plain
from hf_sparse.adapters.probe import computes, kind, likeness
from hf_sparse.adapters.roles import WRITTEN, LayerRoles, Roles, Sizes, linear_size, shape

LAYERS: tuple[type[LayerRoles], ...] = (Gated, Plain, Fused)
"""Every known shape of layers; a new one is a file like theirs and an entry here."""

SHAPES: tuple[type[Roles], ...] = (*LAYERS, Experts, Kept)

_NAMES = ("act_fn", "activation_fn", "activation_function", "hf_sparse_activation")
"""A child of one of these names is the activation, or becomes it where that is written into the forward."""

_NOT_ACTIVATIONS = (nn.Dropout, nn.Identity)


def recognise(module: nn.Module, known: dict[Any, Roles | None] | None = None) -> Roles | None:
    """The roles of ``module``'s children if it is an MLP that can be patched, else None.

    ``known`` takes what was found, for modules that are like one before; while all of these exist.
    """
    stacked = is_stacked(module)
    sizes = {} if stacked else linears(module)
    if not stacked and not 2 <= len(sizes) <= 3:
        return None
    known = {} if known is None else known
    parts = module._modules.items()
    kinds = [(name, None if child is None else kind(child)) for name, child in parts]
    key = *likeness(module), tuple(kinds), tuple(activations(module))
    if key not in known:
        known[key] = _recognise_experts(module) if stacked else _recognise_layers(module, sizes)
    return known[key]


def _recognise_layers(module: nn.Module, sizes: Sizes) -> Roles | None:
    own = activations(module)
    for act in own or _free(module):
        for layers in LAYERS:
            for found in layers.candidates(sizes, act):
                if own:
                    forms = [replace(found, itself=type(module) is nn.Sequential)]
                else:
                    forms = [replace(found, itself=True, written=name) for name in WRITTEN]
                for roles in forms:
                    alone = module._modules.keys() <= set(roles.names)
                    if (alone or not roles.itself) and computes(module, roles):
                        return roles
    return None


def _recognise_experts(module: nn.Module) -> Experts | None:
    for act in activations(module) or _free(module):
        for roles in experts.candidates(module, act):
            if probe_experts.computes(module, roles):
                return roles
    return None


def _free(module: nn.Module) -> list[str]:
    """Where a patch would put an activation that is written in; nowhere if a child may be the activation."""
    if any(name in module._modules for name in _NAMES):
        return []
    return [next(name for name in _NAMES if not hasattr(module, name))]


def is_stacked(module: nn.Module) -> bool:
    """Whether ``module`` has parameters that may be those of several experts."""
    for p in module._parameters.values():
        # One without elements may be sharded (ZeRO-3): it is asked for the shape that it has together.
        if p is not None and (p.dim() == 3 or (p.numel() == 0 and len(shape(p)) == 3)):
            return True
    return False


def linears(module: nn.Module) -> dict[str, tuple[int, int]]:
    """Direct children that act as linear layers, with their ``(in, out)``."""
    sizes = {name: linear_size(child) for name, child in children(module)}
    return {name: size for name, size in sizes.items() if size is not None}


def activations(module: nn.Module) -> list[str]:
    """Direct children that can be an elementwise activation: modules without parameters or children."""
    return [
        name
        for name, child in children(module)
        if all(part is None for part in (*child._parameters.values(), *child._modules.values()))
        and not isinstance(child, _NOT_ACTIVATIONS)
        and linear_size(child) is None
    ]


def children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """As ``named_children``. Looking discloses nothing of a patched block."""
    seen: set[nn.Module] = set()
    for name, child in module._modules.items():
        if child is not None and child not in seen:
            seen.add(child)
            yield name, child
