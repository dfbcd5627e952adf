"""Gradients of linear layers token by token: each token multiplies with a copy of the matrix of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


def weight_of(linear: nn.Module) -> Tensor:
    """``[out, in]``."""
    return linear.weight if isinstance(linear, nn.Linear) else linear.weight.t()


def multiplied(linear: nn.Module, x: Tensor) -> Tensor:
    """What the matrix of ``linear`` is multiplied with: what its threshold leaves of ``x``, if it has one."""
    pruning = vars(linear).get("pruning")
    if pruning is None:
        return x
    score = (x - pruning.center).abs()
    if pruning.weighted:
        score = score * weight_of(linear).detach().norm(dim=0)
    return torch.where(score > pruning.threshold, x, pruning.center)


class OwnCopies:
    """While it is entered, ``linears`` compute as before, but with a matrix for every token, a leaf."""

    def __init__(self, linears: Sequence[nn.Module], rows: Sequence[slice] | None = None) -> None:
        self.linears = linears
        self.rows = rows or [slice(None)] * len(linears)
        """Which rows of its weight are asked for, as of a gate in a fused layer."""
        self.copies: list[Tensor] = [torch.empty(0)] * len(linears)

    def __enter__(self) -> OwnCopies:
        self._handles = [
            linear.register_forward_hook(self._hook(index)) for index, linear in enumerate(self.linears)
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, index: int) -> Callable[..., Tensor]:
        def hook(linear: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            weight = weight_of(linear).detach()
            copies = weight.expand(*args[0].shape[:-1], *weight.shape).clone().requires_grad_()
            self.copies[index] = copies
            y = torch.einsum("...oi,...i->...o", copies, multiplied(linear, args[0]))
            return y if linear.bias is None else y + linear.bias

        return hook

    def squared_gradients(self, index: int) -> Tensor:
        """Of each token, the squared norm of the gradient in its copy: ``[B * S]`` float64."""
        gradient = self.copies[index].grad
        assert gradient is not None
        return gradient[..., self.rows[index], :].double().square().sum((-1, -2)).flatten()
