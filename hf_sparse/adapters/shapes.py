"""The two shapes of MLP that are recognised: gated (gate, up, down) and plain (up, down)."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import permutations

from torch import nn

from hf_sparse.adapters.block import linear_size
from hf_sparse.adapters.probe import computes
from hf_sparse.adapters.roles import Roles

_NOT_ACTIVATIONS = (nn.Dropout, nn.Identity)


def recognise(module: nn.Module) -> Roles | None:
    """The roles of ``module``'s children if it is an MLP that can be patched, else None."""
    if not 2 <= len(linears(module)) <= 3:
        return None
    for roles in _candidates(module):
        if computes(module, roles):
            return roles
    return None


def linears(module: nn.Module) -> dict[str, tuple[int, int]]:
    """Direct children that act as linear layers, with their ``(in, out)``."""
    sizes = {name: linear_size(child) for name, child in module.named_children()}
    return {name: size for name, size in sizes.items() if size is not None}


def activations(module: nn.Module) -> list[str]:
    """Direct children that can be an elementwise activation: modules without parameters or children."""
    return [
        name
        for name, child in module.named_children()
        if not isinstance(child, _NOT_ACTIVATIONS)
        and linear_size(child) is None
        and next(child.parameters(), None) is None
        and next(child.children(), None) is None
    ]


def _candidates(module: nn.Module) -> Iterator[Roles]:
    """Every assignment of children to roles that the declared sizes allow, in the children's order."""
    sizes = linears(module)
    for act in activations(module):
        for names in permutations(sizes):
            *first, down = names
            hidden, intermediate = sizes[first[0]]
            if all(sizes[name] == (hidden, intermediate) for name in first) and sizes[down] == (
                intermediate,
                hidden,
            ):
                gate = first[0] if len(first) == 2 else None
                yield Roles(gate=gate, up=first[-1], down=down, act=act)
