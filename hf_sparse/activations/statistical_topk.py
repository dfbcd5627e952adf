"""Statistical top-k: about a given share of each token's neurons is silent, without sorting."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from hf_sparse.activations.mixed import unmixed
from hf_sparse.activations.per_block import PerBlock
from hf_sparse.checks import known, mapping, numbers
from hf_sparse.errors import PatchError

if TYPE_CHECKING:
    from hf_sparse.adapters import Block

_LEAST = 1e-6  # float32 has no quantile much closer to 0 or 1


@dataclass(frozen=True, kw_only=True, repr=False)
class StatisticalTopKConfig(PerBlock):
    """``statistical_topk``: ``act(relu(p - cutoff))``, ``cutoff = mean(p) + std(p) * Phi^-1(sparsity)``.

    p is the pre-activation, of the gate or of a plain block; mean and standard deviation (not corrected) are
    over the neurons of a token. Spark Transformer (arXiv 2506.06644), with the calls of Gemma-3n in
    transformers. It stands before any activation that is zero at 0, the original one included.

    Raises:
        ValueError: ``sparsity`` is out of its range.

    """

    each: ClassVar[tuple[str, ...]] = ("sparsity",)
    stays: ClassVar[bool] = True
    gives_zeros: ClassVar[bool] = True

    sparsity: float | tuple[float, ...]
    """The share of silent neurons if p is normally distributed, from 0.000001 to 0.999999, or 0 for no
    selection. Or one for each patched block, in the order of ``layers``: Gemma-3n has 0.95 in its first ten
    and 0 in the others."""

    def __post_init__(self) -> None:
        values = numbers("statistical_topk.sparsity", self.sparsity)
        object.__setattr__(self, "sparsity", values)
        for one in values if isinstance(values, tuple) else (values,):
            if one != 0 and not _LEAST <= one <= 1 - _LEAST:
                raise ValueError(
                    f"statistical_topk.sparsity={one} is out of range; it is 0, or from {_LEAST:f} to "
                    f"{1 - _LEAST:f}."
                )

    @classmethod
    def read(cls, value: Any) -> StatisticalTopKConfig:
        if isinstance(value, cls):
            return value
        given = mapping("statistical_topk", value)
        known("statistical_topk", given, ["sparsity"])
        if not given:
            raise ValueError("statistical_topk.sparsity is missing; give the share of silent neurons.")
        return cls(**given)

    def around(self, activation: nn.Module, index: int, block: Block) -> nn.Module:
        sparsity = self.at(index).sparsity
        assert isinstance(sparsity, float)
        if not sparsity:
            return activation
        with torch.no_grad():
            at_zero = float(activation(torch.zeros(1, device="cpu")))
        if at_zero != 0:
            raise PatchError(
                f"statistical_topk puts silent neurons at 0, where {type(activation).__name__} of "
                f'{block.name} is {at_zero:g}; use an activation that is 0 there, such as "relu".'
            )
        return StatisticalTopK(activation, sparsity, neurons=block.intermediate_size)

    def found_in(self, blocks: Sequence[Block]) -> StatisticalTopKConfig:
        found = []
        for block in blocks:
            act, _ = unmixed(block.activation)
            found.append(
                StatisticalTopKConfig(sparsity=act.sparsity if isinstance(act, StatisticalTopK) else 0)
            )
        return self.gathered(found, blocks)


class StatisticalTopK(nn.Module):
    """``activation(relu(p - cutoff))``; see :class:`StatisticalTopKConfig`."""

    def __init__(self, activation: nn.Module, sparsity: float, *, neurons: int) -> None:
        super().__init__()
        self.activation = activation
        self.sparsity = sparsity
        self.neurons = neurons
        quantile = torch.erfinv(
            2 * torch.tensor(sparsity, device="cpu").to("cpu", torch.float32) - 1
        ) * math.sqrt(2)
        dtypes = torch.float64, torch.float32, torch.bfloat16, torch.float16
        # Rounded to the dtype of the model, as in Gemma-3n; no buffer, which loading would have to fill.
        self._quantiles = {dtype: quantile.to(dtype).item() for dtype in dtypes}

    def forward(self, p: Tensor) -> Tensor:
        """``p [..., F]``, any floating dtype, to the same.

        Raises:
            RuntimeError: p has not all neurons of the block.

        """
        if p.shape[-1] != self.neurons:
            raise RuntimeError(
                f"statistical_topk counts the {self.neurons} neurons of a block, and {p.shape[-1]} of them "
                "are here (tensor parallelism splits them): load the model without tp_plan."
            )
        mean, std = p.mean(dim=-1, keepdim=True), p.std(dim=-1, keepdim=True, unbiased=False)
        y: Tensor = self.activation(torch.relu(p - (mean + std * self._quantiles[p.dtype])))
        return y

    def extra_repr(self) -> str:
        return f"sparsity={self.sparsity}"
