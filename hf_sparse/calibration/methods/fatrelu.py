"""FATReLU: a threshold in the place of ReLU's zero (ProSparse, arXiv 2402.13516, section 3.3)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2CLS

from hf_sparse.adapters import Block
from hf_sparse.calibration.of_activation import OfActivation, Values
from hf_sparse.config import SparsityConfig
from hf_sparse.errors import PatchError


class Method(OfActivation):
    """``a = p if p >= t else 0``, with a t for each block: the quantile of max(p, 0).

    For models with ReLU, as they come or after a finetune.
    """

    name = "fatrelu"

    def __init__(self, model: PreTrainedModel, blocks: Sequence[Block], start: SparsityConfig | None) -> None:
        super().__init__(model, blocks, start)
        for block in blocks:
            kind = start.activation.name if start is not None and block.is_patched else "original"
            native = type(block.original_activation) in (nn.ReLU, ACT2CLS["relu"])
            if kind not in ("relu", "fatrelu") and not (native and kind == "original"):
                has = type(block.original_activation).__name__ if kind == "original" else kind
                raise PatchError(
                    f"method='fatrelu' puts a threshold into ReLU, but {block.name} has {has}; choose "
                    "another method, such as 'teal', or patch with \"relu\" and finetune first."
                )

    def values(self, block: Block) -> Values:
        return Rectified(block)


class Rectified(Values):
    """Those of max(p, 0)."""

    site = "p"

    def update(self, values: Tensor, routed: bool) -> None:
        super().update(values.clamp(min=0), routed)
