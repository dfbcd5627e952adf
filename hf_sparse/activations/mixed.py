"""Mixing of two activations, for a finetune that moves from one to the other."""

from __future__ import annotations

from torch import Tensor, nn

from hf_sparse.activations.topk import TopKActivation


def mixed(original: nn.Module, activation: nn.Module, k: float) -> nn.Module:
    """``activation``, which may be mixed already, with the share ``k``; itself if that is 1.

    A selection around it stays around it.
    """
    if isinstance(activation, TopKActivation):
        return TopKActivation(mixed(original, activation.activation, k), activation.topk)
    new = activation.new if isinstance(activation, MixedActivation) else activation
    return new if k == 1 else MixedActivation(original, new, k)


def unmixed(activation: nn.Module) -> tuple[nn.Module, float]:
    """The new activation, without a selection around it, and its share."""
    if isinstance(activation, TopKActivation):
        activation = activation.activation
    return (activation.new, activation.k) if isinstance(activation, MixedActivation) else (activation, 1.0)


class MixedActivation(nn.Module):
    """``(1 - k) * original(p) + k * new(p)`` for 0 < k < 1 (activation mixing, arXiv 2605.25612)."""

    def __init__(self, original: nn.Module, new: nn.Module, k: float) -> None:
        super().__init__()
        self.original = original
        self.new = new
        self.k = k

    def forward(self, p: Tensor) -> Tensor:
        """Any shape and floating dtype to the same."""
        return (1 - self.k) * self.original(p) + self.k * self.new(p)

    def extra_repr(self) -> str:
        return f"k={self.k}"
