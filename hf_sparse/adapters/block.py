"""The description of one MLP block: which child plays which part."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from torch.utils.hooks import RemovableHandle

from hf_sparse.adapters.copies import place
from hf_sparse.adapters.kept import MARK, Kept, KeptState, own_roles, owners
from hf_sparse.adapters.roles import Linear, Roles, Site, Watcher
from hf_sparse.adapters.split import is_split


@dataclass(frozen=True)
class Block:
    """An MLP block in a model, stock or patched."""

    name: str
    """Qualified name, as in ``model.get_submodule(name)``."""
    module: nn.Module
    roles: Roles
    spares: tuple[Block, ...] = ()
    """Copies in the same place that are not in use now, as PEFT's ``modules_to_save`` keeps them."""

    @property
    def place(self) -> str:
        """The name that the block has in the model that its config builds, without PEFT's copies."""
        return place(self.name)

    @property
    def form(self) -> Literal["gated", "plain"]:
        return self.roles.form

    @property
    def stock_class(self) -> type[nn.Module]:
        """The class that transformers gave the block."""
        return getattr(self.module, "stock_class", type(self.module))

    @property
    def activation(self) -> nn.Module:
        return self.roles.activation(self.module)

    @property
    def is_patched(self) -> bool:
        return own_roles(self.module) is not None

    @property
    def stays(self) -> bool:
        """Whether the module stays when it is patched, and only two of its parts are exchanged."""
        return isinstance(self.roles, Kept)

    @property
    def original_activation(self) -> nn.Module:
        """The activation that the block came with."""
        state = vars(self.module).get(MARK)
        if isinstance(state, KeptState):
            return state.original
        return getattr(self.module, "original_activation", self.activation)

    @property
    def replaced_forward(self) -> str | None:
        """The function that another tool runs instead of what was recognised; None if none does."""
        state = vars(self.module).get(MARK)
        if isinstance(state, KeptState) and type(self.module).forward is not state.forward:
            return _name(type(self.module).forward)
        modules = [self.module]
        if isinstance(self.roles, Kept):
            paths = (self.roles.act, self.roles.down)
            modules += [owner for path in paths for owner, _ in owners(self.module, path)]
        return next(filter(None, map(replaced_forward, modules)), None)

    @property
    def parts(self) -> dict[str, nn.Module]:
        """By their places, the modules that a patch exchanges and that may tell a model from another one."""
        if self.stays:
            return {f"{self.place}.{self.roles.act}": self.activation}
        return {self.place: self.module}

    @property
    def hidden_size(self) -> int:
        return self.roles.sizes(self.module)[0]

    @property
    def intermediate_size(self) -> int:
        return self.roles.sizes(self.module)[1]

    def weights(self) -> list[Linear]:
        """Weights and biases as the operators take them, the deciding projection first and down last.

        ``[F, D]``, and ``[D, F]`` of the down projection; of stacked experts with a leading ``E``. Views of
        the parameters, for looking only.
        """
        return self.roles.weights(self.module)

    def watch(self, site: Site, fn: Watcher) -> RemovableHandle:
        """Call ``fn`` with what passes ``site`` in each forward, until the handle's ``remove()``.

        The sites, and what ``fn`` gets there:

        - ``"x"``, the input ``[..., D]``;
        - ``"p"``, the pre-activation ``[..., F]``: of the gate, or of a plain block's up projection;
        - ``"a"``, the output of the activation ``[..., F]``;
        - ``"h"``, the input of the down projection ``[..., F]``, whose exact zeros are the silent neurons;
          what is left of it, if there is a threshold on it (``inputs``);
        - ``"y"``, the output ``[..., D]``.

        With it ``fn`` gets None, or which token each row is of, int64: what is inside of experts has a row
        for each token that is routed to one, ``[S, F]``.

        A patched block whose inside is watched computes with its modules, every neuron; its values are those
        of skipping, to rounding.
        """
        return self.roles.watch(self.module, site, fn)


def replaced_around(model: nn.Module, blocks: Sequence[Block]) -> dict[str, int]:
    """Functions that other tools run instead of modules around ``blocks``, and around how many of them.

    Such a function may call the block or may not. That of ``model`` itself is not asked: it calls layers.
    """
    counts: Counter[str] = Counter()
    for block in blocks:
        names = block.name.split(".")
        around = [".".join(names[:length]) for length in range(1, len(names))]
        counts.update({by for name in around if (by := replaced_forward(model.get_submodule(name)))})
    return dict(counts)


def replaced_forward(module: nn.Module) -> str | None:
    """The function that another tool has put in the place of ``module.forward``; None if none has.

    It may be a wrapper that calls the module's own. Accelerate's, for offloading, and those of transformers
    for modules that are split between processes are known to be.
    """
    if is_split(module):
        return None
    own = vars(module)
    forward = own.get("_old_forward") if "_hf_hook" in own else own.get("forward")
    function = getattr(forward, "__func__", forward)
    if forward is None or function is type(module).forward:
        return None
    return _name(function)


def _name(function: Any) -> str:
    return f"{function.__module__}.{getattr(function, '__qualname__', function)}"
