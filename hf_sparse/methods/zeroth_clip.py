"""Zeroth biases are kept small beside the tokens that they are added to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from hf_sparse.adapters.copies import active
from hf_sparse.fields import require
from hf_sparse.methods.constrained import patched_blocks, require_changeable, require_trained
from hf_sparse.methods.method import Acting, Method, Training
from hf_sparse.modules.zeroth_bias import NAME, ZerothBias
from hf_sparse.norms import Norm, preceding_norms
from hf_sparse.patching import transformers_model

if TYPE_CHECKING:
    from hf_sparse.config import SparsityConfig


@dataclass(frozen=True, kw_only=True)
class ZerothClip(Method):
    """Clipping of zeroth biases (the code released with arXiv 2309.03004 and 2605.25612).

    After each update ``|D[t, j]| <= share * |w[j]|``, with the gain w of the norm before the block; without
    such a norm, ``share`` itself is the bound.
    """

    name = "zeroth_clip"

    share: float = 0.1
    """Of the gain (published: 0.1)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.share > 0, "methods.zeroth_clip.share", self.share, "it must be positive")

    def check(self, sparsity: SparsityConfig | None) -> None:
        if sparsity is None or NAME not in sparsity.parts:
            raise ValueError(
                "methods.zeroth_clip clips zeroth biases, and the model has none: leave it out, or patch "
                "with {activation: ..., zeroth_bias: {positions: ...}}."
            )

    def attach(self, training: Training) -> Acting:
        blocks = patched_blocks(training.model)
        leaves = {b.place: leaf for b in blocks if (leaf := b.module._modules.get(NAME)) is not None}
        found = {at: leaf for at, one in leaves.items() if isinstance(leaf := active(one), ZerothBias)}
        if not found:
            self.check(None)
        for at, leaf in found.items():
            require_trained(leaf.bias, f"{at}.{NAME}", self.name)
        with_bias = [block for block in blocks if block.place in found]
        norms = preceding_norms(transformers_model(training.model), with_bias)
        return _Acting([(leaf, norms[at]) for at, leaf in found.items()], self.share)


class _Acting(Acting):
    def __init__(self, leaves: Sequence[tuple[ZerothBias, Norm | None]], share: float) -> None:
        self._leaves, self._share = leaves, share

    def after_step(self, step: int) -> None:
        for leaf, norm in self._leaves:
            require_changeable(leaf.bias, ZerothClip.name)
            gain = None if norm is None else norm.whole_gain()
            if gain is None:
                leaf.bias.clamp_(-self._share, self._share)
                continue
            limit = (self._share * gain.abs()).to(leaf.bias.device, leaf.bias.dtype)
            leaf.bias.copy_(torch.clamp(leaf.bias, -limit, limit))
