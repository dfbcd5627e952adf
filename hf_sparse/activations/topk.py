"""Top-k: of each token's input of the down projection only the largest values are kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn

from hf_sparse.activations.per_block import PerBlock
from hf_sparse.checks import known, mapping, numbers, shown, sized
from hf_sparse.errors import PatchError

if TYPE_CHECKING:
    from hf_sparse.adapters import Block

RESCALES = (None, "norm", "unit")


@dataclass(frozen=True, kw_only=True, repr=False)
class TopKConfig(PerBlock):
    """``topk``: of h, the input of the down projection, each token keeps the k values largest in magnitude.

    That is the FFN of Q-Sparse (arXiv 2407.10969) and, where h is not negative, as in a plain block with
    ReLU, that of the top-k Transformer (The Lazy Neuron Phenomenon, arXiv 2210.06313). It stands beside any
    activation, the original one included. In an expert, its own neurons count.

    Raises:
        ValueError: a field is out of its range; the message names the field, the value and the mend.

    """

    each: ClassVar[tuple[str, ...]] = ("share", "k")
    stays: ClassVar[bool] = True
    gives_zeros: ClassVar[bool] = True

    share: float | tuple[float, ...] | None = None
    """Of the neurons, those to keep, 0 < share <= 1: k is ``share * F``, rounded, and at least 1. Or one for
    each patched block, in the order of ``layers``."""

    k: int | tuple[int, ...] | None = None
    """Their number, at least 1, in the place of ``share``; or one for each patched block."""

    straight_through: bool = False
    """Whether gradients ignore the selection, as in Q-Sparse: of what is dropped h gets the gradient that it
    would get if it were kept. Else it gets none."""

    rescale: str | None = None
    """What is kept is multiplied by one number for each token: ``"norm"`` gives it the L2 norm that all of h
    has; ``"unit"`` gives it the norm 1, as the paper of Q-Sparse has it for training from scratch."""

    def __post_init__(self) -> None:
        if (self.share is None) == (self.k is None):
            raise ValueError(
                f"topk.share={shown(self.share)} and topk.k={shown(self.k)}: give one of them, the share of "
                "the neurons to keep or their number."
            )
        if self.share is not None:
            object.__setattr__(self, "share", numbers("topk.share", self.share))
            for one in _each(self.share):
                if not 0 < one <= 1:
                    raise ValueError(f"topk.share={one} is outside of (0, 1]; it is a share of the neurons.")
        else:
            object.__setattr__(self, "k", _counts(self.k))
        if type(self.straight_through) is not bool:
            raise ValueError(
                f"topk.straight_through={shown(self.straight_through)} is neither true nor false."
            )
        if not isinstance(self.rescale, str | None) or self.rescale not in RESCALES:
            raise ValueError(
                f'topk.rescale={shown(self.rescale)} is not known; choose "norm" or "unit", or leave it out.'
            )

    @classmethod
    def read(cls, value: Any) -> TopKConfig:
        if isinstance(value, cls):
            return value
        given = mapping("topk", value)
        known("topk", given, [field.name for field in fields(cls)])
        return cls(**given)

    def check(self, block: Block) -> None:
        if block.stays and block.form == "gated":
            raise PatchError(
                f"topk chooses from the product of gate and up, but {block.name} is gated and stays a "
                f"{block.stock_class.__name__} when it is patched; leave topk out, or use statistical_topk."
            )

    def around(self, activation: nn.Module, index: int, block: Block) -> nn.Module:
        if not block.stays:
            return activation
        return TopKActivation(activation, TopK.of(self.at(index), neurons=block.intermediate_size))

    def build(self, mlp: nn.Module, index: int) -> None:
        block = cast(Any, mlp)
        block.topk = TopK.of(self.at(index), neurons=block.roles.sizes(block)[1])

    def found_in(self, blocks: Sequence[Block]) -> TopKConfig:
        found = [vars(block.activation if block.stays else block.module).get("topk") for block in blocks]
        return self.gathered([one and one.config for one in found], blocks)


@dataclass(frozen=True)
class TopK:
    """What a block does to its h."""

    config: TopKConfig
    """With values for this block."""
    neurons: int
    k: int

    @classmethod
    def of(cls, config: TopKConfig, *, neurons: int) -> TopK:
        """The selection among so many ``neurons``.

        Raises:
            PatchError: there are fewer of them than are to be kept.

        """
        k = cast(int, config.k) if config.share is None else round(cast(float, config.share) * neurons)
        if k > neurons:
            raise PatchError(
                f"topk.k={k} is more than the {neurons} neurons of an MLP block; give a smaller one."
            )
        return cls(config, neurons, max(k, 1))

    def __call__(self, h: Tensor) -> Tensor:
        """``h [..., F]``, any floating dtype, to the same, with exact zeros.

        Raises:
            RuntimeError: h has not all neurons of the block.

        """
        if h.shape[-1] != self.neurons:
            raise RuntimeError(
                f"topk chooses among the {self.neurons} neurons of a block, and {h.shape[-1]} of them are "
                "here (tensor parallelism splits them): load the model without tp_plan."
            )
        z = keep_largest(h, self.k, straight_through=self.config.straight_through)
        if self.config.rescale is None:
            return z
        wanted = _norm(h) if self.config.rescale == "norm" else 1.0
        return (z * (wanted / _norm(z).clamp(min=1e-12))).to(h.dtype)


class TopKActivation(nn.Module):
    """An activation and its selection, for a plain block whose module stays: its h is what this gives."""

    def __init__(self, activation: nn.Module, topk: TopK) -> None:
        super().__init__()
        self.activation = activation
        self.topk = topk

    def forward(self, p: Tensor) -> Tensor:
        """``p [..., F]``, any floating dtype, to the same."""
        return self.topk(self.activation(p))

    def extra_repr(self) -> str:
        return f"k={self.topk.k}"


def keep_largest(h: Tensor, k: int, *, straight_through: bool = False) -> Tensor:
    """The ``k`` values of ``h [..., F]`` that are largest in magnitude, along the last dimension; the rest 0.

    Of equal values as many are kept as there is room for. NaN counts as the largest. ``straight_through``:
    the gradient of ``h`` is that of the result, everywhere.
    """
    largest = h.detach().abs().topk(k, dim=-1, sorted=False).indices
    kept = torch.zeros_like(h, dtype=torch.bool).scatter_(-1, largest, True)
    if straight_through and torch.is_grad_enabled():
        return torch.where(kept, h, h - h.detach())  # zero, with a gradient
    return h.masked_fill(~kept, 0)


def _norm(h: Tensor) -> Tensor:
    """The L2 norm ``[..., 1]``, in float32: squares of 16 bits overflow."""
    return torch.linalg.vector_norm(
        h, dim=-1, keepdim=True, dtype=torch.promote_types(h.dtype, torch.float32)
    )


def _each(values: Any) -> Sequence[Any]:
    return values if isinstance(values, tuple) else (values,)


def _counts(value: Any) -> int | tuple[int, ...]:
    many = isinstance(value, list | tuple)
    if many:
        sized("topk.k", value)
    for one in value if many else [value]:
        if type(one) is not int or one < 1:
            raise ValueError(f"topk.k={shown(value)} is not a number of neurons: give a whole one, from 1.")
    if many and not value:
        raise ValueError("topk.k=() has no value; give one number, or one per patched block.")
    return tuple(value) if many else value
