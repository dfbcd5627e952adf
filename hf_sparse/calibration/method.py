"""What a method of calibration has to answer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from transformers import PreTrainedModel

from hf_sparse.adapters import Block
from hf_sparse.config import SparsityConfig
from hf_sparse.observing import BlockObserver


class Calibration(ABC):
    """One method, on one model: the class ``Method`` of a file in ``methods/``, by the name of the file.

    First its :meth:`observers` look at the dense model; from what they saw, :meth:`config` makes a
    :class:`~hf_sparse.SparsityConfig` for any level. The level goes from 0, where nothing is pruned that was
    not silent before, towards 1, and both the sparsity and the damage grow with it.
    """

    counts: ClassVar[str]
    """What its sparsity is a share of, for the report."""

    allocations: ClassVar[tuple[str, ...]] = ("uniform",)
    """How it can spread a sparsity over what it prunes; the first is the default."""

    def __init__(self, model: PreTrainedModel, blocks: Sequence[Block], start: SparsityConfig | None) -> None:
        """Get ready for ``blocks`` of ``model``, whose config is ``start``, None if it is not patched.

        Raises:
            PatchError: the method does not suit the model; says why, and what to do.

        """
        self.model, self.blocks, self.start = model, blocks, start
        self.allocation = self.allocations[0]

    @property
    def base(self) -> SparsityConfig | None:
        """The config with which the observers look; None for the stock model."""
        return self.start

    @abstractmethod
    def observers(self, blocks: Sequence[Block]) -> list[BlockObserver]:
        """New ones, for the same blocks as they are now; kept, and asked in the other methods."""

    def finish(self, most: float) -> None:  # noqa: B027 - most need nothing else
        """What the model, as the observers saw it, is still needed for; levels will be at most ``most``."""

    @abstractmethod
    def config(self, level: float) -> SparsityConfig:
        """What to patch the model with at ``level``, 0 to 1."""

    @abstractmethod
    def expected(self, level: float) -> float:
        """The sparsity at ``level`` if activations stay as they were seen; it grows with the level."""

    @abstractmethod
    def counters(self, blocks: Sequence[Block]) -> list[BlockObserver]:
        """Those that count the sparsity of the patched model, for :meth:`counted`."""

    @abstractmethod
    def counted(self, counters: Sequence[BlockObserver]) -> float:
        """The sparsity that ``counters`` found."""

    @abstractmethod
    def reach(self, tokens: int) -> float:
        """How much a sparsity of 1 would be of the weights that a token needs, so that methods compare.

        At sparsity s a token does not need ``s * reach`` of the weights of the linear layers in the layers of
        the blocks, attention and MLP alike. Asked when the observers have seen ``tokens`` of text.
        """

    def settle(self, level: float) -> None:  # noqa: B027 - most have nothing to tell
        """Tell the patched modules what is known of their density, so that they choose well at once."""
