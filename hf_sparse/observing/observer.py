"""What looks at a site of a block."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import ClassVar, TypeVar

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from hf_sparse.adapters import Block
from hf_sparse.adapters.roles import Site

Self = TypeVar("Self", bound="BlockObserver")


class BlockObserver(ABC):
    """Looks, while it is entered, at what passes one block; :class:`Observer` and ``CallObserver`` say where.

    What it keeps should not grow with the data: a pass may be long.
    """

    def __init__(self, block: Block) -> None:
        self.block = block
        self.mask: Tensor | None = None
        """Int ``[B, S]`` of the batch, 0 at padding; None means there is none."""
        self.lengths: Sequence[int] = ()
        """Tokens of each sequence of the batch, without padding. The rows of an update are those of the first
        sequence, in order, then those of the next; but of experts, which have an order of their own."""

    @abstractmethod
    def _watch(self) -> Iterator[RemovableHandle]:
        """Begin to look; whoever has entered removes what this gives."""

    def __enter__(self: Self) -> Self:
        with ExitStack() as stack:
            for handle in self._watch():
                stack.callback(handle.remove)
            self._handles = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._handles.close()

    def _text(self, values: Tensor, tokens: Tensor | None, mask: Tensor | None) -> Tensor:
        """The rows of ``values`` that are no padding."""
        rows = values.flatten(0, -2)
        if mask is None:
            return rows
        is_text = mask.flatten().to(rows.device).bool()
        if tokens is not None:
            is_text = is_text[tokens]
        if len(rows) != len(is_text):
            raise ValueError(
                f"{self.block.name} received {len(rows)} tokens of a batch of {mask.numel()}, so "
                "padding cannot be told from text there; give batches without padding."
            )
        return rows[is_text]


class Observer(BlockObserver):
    """Looks, while it is entered, at what passes one site of one block."""

    site: ClassVar[Site] = "h"
    """Where; see :meth:`hf_sparse.adapters.Block.watch`."""

    @abstractmethod
    def update(self, values: Tensor, routed: bool) -> None:
        """Look at ``values`` ``[T, F]``, or ``[T, D]`` at a site of that width: tokens without padding.

        ``routed`` says that they are of experts, where a token may have several rows or none, and a column is
        a neuron of each expert.
        """

    def update_gradient(self, values: Tensor, gradient: Tensor, routed: bool) -> None:
        """Look at ``values``, as above, and the gradient of the summed loss in them."""

    def _watch(self) -> Iterator[RemovableHandle]:
        yield self.block.watch(self.site, self._see)

    def _see(self, values: Tensor, tokens: Tensor | None) -> None:
        mask = self.mask
        routed = tokens is not None
        if values.requires_grad:
            values.register_hook(
                lambda gradient: self.update_gradient(
                    self._text(values.detach(), tokens, mask), self._text(gradient, tokens, mask), routed
                )
            )
        self.update(self._text(values.detach(), tokens, mask), routed)
