"""An MLP whose module stays as it is: only its activation and its down projection are exchanged.

Its parts are children of a layer (OPT, BART), lie in two modules (BERT), or belong to a module whose forward
does more than the formula: a residual (BLOOM), a norm before the down projection (BitNet), a clamp. What they
have in common: where the activation gives exactly zero, so is the input of the down projection.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from torch.utils.hooks import RemovableHandle

from hf_sparse.adapters.copies import copies
from hf_sparse.adapters.roles import Linear, Roles, Site, Watcher, linear_size, read_linear, watch_child

MARK = "hf_sparse_kept"
"""The attribute of a patched module that stays: its :class:`KeptState`."""


@dataclass(frozen=True, kw_only=True)
class Kept(Roles):
    """Names relative to the module that stays, with dots: ``"intermediate.dense"``."""

    first: tuple[str, ...]
    """The projections before the activation: the gate, or the only one, and then the up projection."""
    halves: Literal["gate first", "up first"] | None
    """How gate and up lie in one layer, if they do."""

    formula = "an activation whose zeros reach a down projection, in a module with a forward of its own"

    @property
    def form(self) -> Literal["gated", "plain"]:
        return "gated" if self.halves or len(self.first) == 2 else "plain"

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.first, self.down, self.act)

    def takes_relu_up(self, module: nn.Module) -> bool:
        return False

    def sizes(self, module: nn.Module) -> tuple[int, int]:
        size = linear_size(module.get_submodule(self.down))
        assert size is not None
        return size[1], size[0]

    def weights(self, module: nn.Module) -> list[Linear]:
        first = [read_linear(module.get_submodule(name)) for name in self.first]
        if self.halves:
            ((weight, bias),) = first
            first = list(zip(weight.chunk(2), (None, None) if bias is None else bias.chunk(2), strict=True))
            first = first if self.halves == "gate first" else first[::-1]
        return [*first, read_linear(module.get_submodule(self.down))]

    def watch(self, module: nn.Module, site: Site, fn: Watcher) -> RemovableHandle:
        # The module may be a whole layer: x is what the first projection gets, y what the last one gives.
        name = {"x": self.first[0], "p": self.act, "a": self.act, "h": self.down, "y": self.down}[site]
        return watch_child(module.get_submodule(name), fn, before=site in ("x", "p", "h"))


@dataclass(eq=False)
class KeptState:
    """What a patched module that stays has of the patch."""

    roles: Kept
    original: nn.Module
    """The activation that it came with. No child of the module: this is no module."""
    forward: Any
    """The function of its class that was recognised: other tools replace it."""
    others: tuple[str, ...] = ()
    """As :attr:`hf_sparse.modules.SparseBlock.others`."""
    density: float | None = None
    """As :attr:`hf_sparse.modules.SparseBlock.density`."""


def owners(module: nn.Module, path: str) -> Iterator[tuple[nn.Module, str]]:
    """The modules that hold the child ``path``, with its name there: several where PEFT keeps copies."""
    *parents, last = path.split(".")
    found = [module]
    for parent in parents:
        found = [
            child
            for one in found
            for owner, name in copies(one, parent)
            if (child := owner._modules[name]) is not None
        ]
    for one in found:
        yield one, last


def own_roles(module: nn.Module) -> Roles | None:
    """The roles that a patched block has with it; None if the module is none."""
    if isinstance(own := vars(module).get("roles"), Roles):
        return own
    return own.roles if isinstance(own := vars(module).get(MARK), KeptState) else None
