"""What is known of the modules of one model: none is looked at twice, nor probed if one like it was."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from hf_sparse.adapters.probe import kind
from hf_sparse.adapters.roles import Roles

_NOT_ACTIVATIONS = (nn.Dropout, nn.Identity)


class Children(NamedTuple):
    """What the direct children of a module can be."""

    linears: dict[str, tuple[int, int]]
    """Those that act as linear layers, with their ``(in, out)``."""
    activations: list[str]
    """Those that can be an elementwise activation: modules without parameters or children."""
    parents: dict[str, nn.Module]
    """Those that have children themselves."""
    kinds: list[Any]
    """Equal for children that are alike, where none of them runs itself."""

    @classmethod
    def of(cls, module: nn.Module) -> Children:
        """Looking discloses nothing of a patched block; a child of two names counts as the first."""
        found = cls({}, [], {}, [])
        seen: set[nn.Module] = set()
        for name, child in module._modules.items():
            if child is None:
                found.kinds.append((name, None))
                continue
            alike = kind(child)
            found.kinds.append((name, alike))
            if child in seen:
                continue
            seen.add(child)
            if child._modules:
                found.parents[name] = child
            if (size := alike[-1]) is not None:
                found.linears[name] = size
            elif _is_bare(child) and not isinstance(child, _NOT_ACTIVATIONS):
                found.activations.append(name)
        return found


class Known:
    """For one walk over a model, while all of its modules exist."""

    def __init__(self) -> None:
        self.roles: dict[Any, Roles | None] = {}
        """By what makes modules alike."""
        self._children: dict[int, Children] = {}

    def children(self, module: nn.Module) -> Children:
        """Of ``module``, a module of that model."""
        key = id(module)
        if key not in self._children:
            self._children[key] = Children.of(module)
        return self._children[key]


def _is_bare(module: nn.Module) -> bool:
    return all(part is None for part in (*module._parameters.values(), *module._modules.values()))
