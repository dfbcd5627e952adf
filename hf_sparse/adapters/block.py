"""The description of one MLP block: which child plays which part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn
from torch.utils.hooks import RemovableHandle

from hf_sparse.adapters.copies import place
from hf_sparse.adapters.roles import Linear, Roles, Site, Watcher


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
        - ``"y"``, the output ``[..., D]``.

        With it ``fn`` gets None, or which token each row is of, int64: what is inside of experts has a row
        for each token that is routed to one, ``[S, F]``.

        A patched block whose inside is watched computes with its modules, every neuron; its values are those
        of skipping, to rounding.
        """
        return self.roles.watch(self.module, site, fn)


def replaced_forward(module: nn.Module) -> str | None:
    """The function that another tool has put in the place of ``module.forward``; None if none has.

    It may be a wrapper that calls the module's own. Accelerate's, for offloading, is known to be one.
    """
    own = vars(module)
    forward = own.get("_old_forward") if hasattr(module, "_hf_hook") else own.get("forward")
    function = getattr(forward, "__func__", forward)
    if forward is None or function is type(module).forward:
        return None
    return f"{function.__module__}.{getattr(function, '__qualname__', function)}"
