"""What is known of the modules of one model: none is looked at twice, nor probed if one like it was."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from hf_sparse.activations.known import STOCK_ACTIVATIONS
from hf_sparse.adapters.probe import kind
from hf_sparse.adapters.roles import Roles

_NOT_ACTIVATIONS = (nn.Dropout, nn.Identity)


@dataclass(slots=True)
class Children:
    """What the direct children of a module can be; one of two names counts as the first."""

    linears: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Those that act as linear layers, with their ``(in, out)``."""
    activations: list[str] = field(default_factory=list)
    """Those that can be an elementwise activation: modules without parameters or children."""
    parents: dict[str, nn.Module] = field(default_factory=dict)
    """Those that have children themselves."""
    kinds: list[Any] = field(default_factory=list)
    """Equal for children that are alike, where none of them runs itself."""
    owns_activation: bool = False
    """Whether one of them is an activation of transformers, be it one with parameters."""

    @classmethod
    def of(cls, module: nn.Module) -> Children:
        """The children of ``module``. Looking discloses nothing of a patched block."""
        found = cls()
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
                continue
            found.owns_activation |= issubclass(type(child), STOCK_ACTIVATIONS)
            if _is_bare(child) and not isinstance(child, _NOT_ACTIVATIONS):
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
    for parts in (module._parameters, module._modules):
        for part in parts.values():
            if part is not None:
                return False
    return True
