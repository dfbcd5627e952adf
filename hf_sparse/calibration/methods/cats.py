"""CATS: a threshold on the values of the model's own SiLU or GELU (arXiv 2404.08763)."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel

from hf_sparse.activations.cats import CLASSES, fitting
from hf_sparse.adapters import Block
from hf_sparse.calibration.of_activation import OfActivation, Values
from hf_sparse.config import SparsityConfig
from hf_sparse.errors import PatchError


class Method(OfActivation):
    """``a if |a| >= t else 0`` with a the model's own activation; t, of each block, is a quantile of |a|."""

    def __init__(self, model: PreTrainedModel, blocks: Sequence[Block], start: SparsityConfig | None) -> None:
        super().__init__(model, blocks, start)
        if start is not None and start.activation.name not in ("original", *CLASSES):
            raise PatchError(
                "method='cats' puts a threshold on the model's own activation, but it is patched with "
                f"{start.activation.name!r}; hf_sparse.unpatch(model) first, or choose another method."
            )
        self._name = fitting(blocks[0])

    @property
    def name(self) -> str:
        return self._name

    def values(self, block: Block) -> Values:
        return Activated(block)


class Activated(Values):
    """Those of the activation."""

    site = "a"
