"""What looks at several sites of a block together, with the gradients in them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from functools import partial
from typing import ClassVar

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_sparse.adapters import Block
from hf_sparse.adapters.experts import Experts
from hf_sparse.adapters.roles import Site, input_pruning, used, watch_child
from hf_sparse.errors import PatchError
from hf_sparse.observing.observer import BlockObserver

_ORDER: tuple[Site, ...] = ("x", "p", "a", "h", "y")
"""That of a forward."""


class Call:
    """What one call of a block had at each site."""

    def __init__(self, mask: Tensor | None) -> None:
        self.mask = mask
        self.values: dict[Site, Tensor] = {}
        self.versions: dict[Site, int] = {}
        self.gradients: dict[Site, Tensor] = {}


class CallObserver(BlockObserver):
    """Looks, while it is entered, at several sites of one block, call by call, with gradients.

    It needs a pass with ``grad=True``. Between forward and backward of a batch it keeps what the graph keeps
    anyway. A block that is called twice in a forward has two calls.

    Raises:
        PatchError: the block is of experts, where what is inside has another row for each expert of a token.

    """

    values_at: ClassVar[tuple[Site, ...]]
    """Sites whose values are looked at."""
    gradients_at: ClassVar[tuple[Site, ...]]
    """Sites whose gradients are looked at."""

    def __init__(self, block: Block) -> None:
        if isinstance(block.roles, Experts):
            raise PatchError(
                f"{block.name} ({block.stock_class.__name__}) is of experts, where a token has several rows "
                "or none, so that its sites do not belong together row by row. Choose a model without."
            )
        super().__init__(block)
        self._begun = self._finished = 0

    @abstractmethod
    def update_call(self, values: Mapping[Site, Tensor], gradients: Mapping[Site, Tensor]) -> None:
        """Look at one call: tensors ``[T, F]`` or ``[T, D]`` by site, tokens without padding.

        ``gradients`` are those of the summed loss of the batch.
        """

    def require_gradients(self) -> None:
        """Refuse what was counted if the loss does not depend on each call.

        Raises:
            PatchError: it does not.

        """
        if self._begun != self._finished:
            raise PatchError(
                f"{self.block.name} was called {self._begun} times, and the gradient of the loss reached "
                f"{self._finished} of the calls; what the others add to its density cannot be told."
            )

    def _watch(self) -> Iterator[RemovableHandle]:
        for site in self._sites():
            if site == "h" and site in self.gradients_at and input_pruning(down := self._down) is not None:
                # What is used of h is computed for whoever looks: no gradient reaches that.
                yield watch_child(down, self._pass_pruned, before=True)
            else:
                yield self.block.watch(site, partial(self._pass, site))

    @property
    def _down(self) -> nn.Module:
        return self.block.module.get_submodule(self.block.roles.down)

    def _pass_pruned(self, h: Tensor, tokens: Tensor | None) -> None:
        self._pass("h", h, tokens)
        if "h" in self.values_at:
            kept = used(self._down, h.detach())
            self._call.values["h"], self._call.versions["h"] = kept, kept._version

    def _sites(self) -> list[Site]:
        return [site for site in _ORDER if site in {*self.values_at, *self.gradients_at}]

    def _pass(self, site: Site, values: Tensor, _: Tensor | None) -> None:
        if site == self._sites()[0]:
            self._begun += 1
            self._call = Call(self.mask)
        call = self._call
        if site in self.values_at:
            call.values[site] = values.detach()
            call.versions[site] = values._version
        if site in self.gradients_at:
            if not values.requires_grad:
                raise ValueError(
                    f"site {site!r} of {self.block.name} takes no gradient: observe was called without "
                    "grad=True, or the block does not depend on the embeddings of the model."
                )
            values.register_hook(partial(self._gradient, call, site))

    def _gradient(self, call: Call, site: Site, gradient: Tensor) -> None:
        call.gradients[site] = gradient
        if len(call.gradients) < len(self.gradients_at):
            return
        changed = [at for at, values in call.values.items() if values._version != call.versions[at]]
        if changed:
            raise PatchError(
                f"what passes {', '.join(changed)} of {self.block.name} is changed in place later, so its "
                "values cannot be looked at; use an activation that is not inplace."
            )
        self._finished += 1
        self.update_call(
            {at: self._text(one, None, call.mask) for at, one in call.values.items()},
            {at: self._text(one, None, call.mask) for at, one in call.gradients.items()},
        )
        call.values.clear()
        call.gradients.clear()
