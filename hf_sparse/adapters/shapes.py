"""Which shape of MLP a module has, of those that are known."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from hf_sparse.adapters import experts, probe_experts
from hf_sparse.adapters.experts import Experts
from hf_sparse.adapters.fused import Fused
from hf_sparse.adapters.gated import Gated
from hf_sparse.adapters.kept import Kept
from hf_sparse.adapters.known import Children, Known
from hf_sparse.adapters.plain import Plain
from hf_sparse.adapters.probe import computes, likeness
from hf_sparse.adapters.roles import WRITTEN, LayerRoles, Roles, shape

LAYERS: tuple[type[LayerRoles], ...] = (Gated, Plain, Fused)
"""Every known shape of layers; a new one is a file like theirs and an entry here."""

SHAPES: tuple[type[Roles], ...] = (*LAYERS, Experts, Kept)

_NAMES = ("act_fn", "activation_fn", "activation_function", "hf_sparse_activation")
"""A child of one of these names is the activation, or becomes it where that is written into the forward."""


def recognise(module: nn.Module, known: Known | None = None) -> Roles | None:
    """The roles of ``module``'s children if it is an MLP that can be patched, else None."""
    known = Known() if known is None else known
    stacked, children = is_stacked(module), known.children(module)
    if not stacked and not 2 <= len(children.linears) <= 3:
        return None
    key = *likeness(module), *children.kinds, *children.activations
    if key not in known.roles:
        recognised = _recognise_experts if stacked else _recognise_layers
        known.roles[key] = recognised(module, children)
    return known.roles[key]


def _recognise_layers(module: nn.Module, children: Children) -> Roles | None:
    own, sizes = children.activations, children.linears
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


def _recognise_experts(module: nn.Module, children: Children) -> Experts | None:
    for act in children.activations or _free(module):
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
