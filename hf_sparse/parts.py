"""What a part of a :class:`~hf_sparse.SparsityConfig` has to answer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from torch import nn
from transformers import PreTrainedModel

from hf_sparse.errors import PatchError

if TYPE_CHECKING:
    from hf_sparse.adapters import Block

Self = TypeVar("Self", bound="Part")


class Part(ABC):
    """One thing that the MLP blocks of a model compute, configured beside the code that computes it.

    A part is a frozen dataclass with its own validation. ``hf_sparse.config.PARTS`` names it; that entry is
    all that the rest of the package needs. What belongs to a block as parameters is a
    :class:`~hf_sparse.modules.ParameterLeaf`, a child of the block with the name of the part.
    """

    stays: ClassVar[bool] = False
    """Whether a block whose module stays when it is patched can take it, too."""

    gives_zeros: ClassVar[bool] = False
    """Whether it makes values of h, the input of the down projection, exactly zero."""

    @classmethod
    @abstractmethod
    def read(cls: type[Self], value: Any) -> Self:
        """The part from what :meth:`to_dict` gave, as untrusted input, or from a short form of it.

        Raises:
            ValueError: names the field, its value and the mend.

        """

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; without fields that have their default."""

    @property
    def blocks(self) -> int | None:
        """How many blocks its values are for; None if all are alike."""
        return None

    def arranged(self: Self, order: Sequence[int]) -> Self:
        """With the values of its blocks in another order."""
        return self

    def check(self, block: Block) -> None:  # noqa: B027 - most parts suit every block
        """Refuse a block that cannot take this part.

        Raises:
            PatchError: says why, and what to do.

        """

    def fitted(self: Self, model: PreTrainedModel, blocks: Sequence[Block]) -> Self:
        """The part for ``blocks`` of ``model``, with what it leaves to the model filled in.

        Raises:
            PatchError: the model cannot have it; says why, and what to do.

        """
        return self

    def rehearse(self, model: PreTrainedModel, blocks: Sequence[Block]) -> None:  # noqa: B027 - most need not
        """Try a forward without weights, where the rest of the model matters; not asked while one is loaded.

        Raises:
            PatchError: this part would be wrong in ``model``.

        """

    def around(self, activation: nn.Module, index: int, block: Block) -> nn.Module:
        """What is put in the place of ``activation``, that of the ``index``-th patched block: itself, mostly.

        Raises:
            PatchError: ``activation`` of ``block`` cannot take this part.

        """
        return activation

    def build(self, mlp: nn.Module, index: int) -> None:  # noqa: B027 - the activation is built with the block
        """Put what this part is into ``mlp``, the sparse block of the ``index``-th patched block."""

    def outside(
        self, model: nn.Module, chosen: Sequence[Block], blocks: Sequence[Block]
    ) -> list[Callable[[], None]]:
        """What it does to modules of ``model`` outside of the ``chosen`` ones of its ``blocks``.

        Assignments, which are made later; :meth:`undoing` is called, and its result made, before.

        Raises:
            PatchError: ``model`` cannot take this part.

        """
        return []

    @classmethod
    def undoing(cls, model: nn.Module, blocks: Sequence[Block]) -> list[Callable[[], None]]:
        """What puts such modules back, in the layers of ``blocks``, wherever one is changed."""
        return []

    def confirm(  # noqa: B027 - most parts are in their blocks alone
        self, model: nn.Module, chosen: Sequence[Block], blocks: Sequence[Block]
    ) -> None:
        """Refuse modules outside of the ``chosen`` blocks, those that are patched, that are not as it says.

        Raises:
            PatchError: says which.

        """

    def found_in(self: Self, blocks: Sequence[Block]) -> Self:
        """The part as it is in ``blocks``, those that are patched now, in their order.

        Raises:
            PatchError: that cannot be said.

        """
        if self.blocks not in (None, len(blocks)):
            raise PatchError(
                f"{type(self).__name__} has values for {self.blocks} blocks, but {len(blocks)} are patched."
            )
        return self
