"""Both passes of an MLP block: what a training sees of it, against the formula in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import triton_ops
from support.kernel_blocks import Block
from triton_ops import reference


@dataclass
class Passes:
    """An output, and the gradients of the tensors of a block, in the order of the operators."""

    y: Tensor
    grads: list[Tensor | None]


def passes(block: Block, run: Callable[..., Tensor], frozen: tuple[int, ...] = ()) -> Passes:
    """Of ``run``, called as ``trained_mlp`` is, by a gradient that is the same for every run."""
    given = enumerate(arguments(block))
    tensors = [None if t is None else t.detach().requires_grad_(i not in frozen) for i, t in given]
    y = run(*tensors, activation=block.activation, threshold=block.threshold)
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y.backward(direction.to(y.dtype))
    return Passes(y.detach(), [None if t is None else t.grad for t in tensors])


def arguments(block: Block) -> list[Tensor | None]:
    """The tensors of ``trained_mlp``, in its order."""
    if block.gate is None:
        return [block.x, block.up, None, block.down, block.up_bias, None, block.down_bias]
    return block.tensors()


def skipping(*tensors: Tensor | None, **options: object) -> Tensor:
    """The sparse way, whatever the density."""
    return triton_ops.trained_mlp(*tensors, max_density=1.0, **options)  # type: ignore[arg-type]


def dense(*tensors: Tensor | None, activation: str, threshold: float | Tensor) -> Tensor:
    x, first, up, down, first_bias, _, down_bias = tensors
    kind = {"activation": activation, "threshold": threshold}
    if up is None:
        return reference.plain_mlp(x, first, down, first_bias, down_bias, **kind)  # type: ignore[arg-type]
    return reference.gated_mlp(*tensors, **kind)  # type: ignore[arg-type]


def in_float64(block: Block) -> Block:
    names = ("x", "gate", "up", "down", "gate_bias", "up_bias", "down_bias", "threshold")
    values = {name: getattr(block, name) for name in names}
    return replace(block, **{k: v.double() if isinstance(v, Tensor) else v for k, v in values.items()})


def assert_as_exact(block: Block, factor: float = 3.0) -> None:
    """Errors of the output and of every gradient are those of dense training, but for a factor."""
    own, usual, exact = passes(block, skipping), passes(block, dense), passes(in_float64(block), dense)
    eps = torch.finfo(block.x.dtype).eps
    for mine, theirs, right in zip(
        [own.y, *own.grads], [usual.y, *usual.grads], [exact.y, *exact.grads], strict=True
    ):
        if right is None:
            assert mine is None
            continue
        assert mine is not None
        assert mine.shape == right.shape
        assert mine.dtype == block.x.dtype
        error, allowed = (mine - right).abs().max(), (theirs - right).abs().max()
        assert error <= factor * allowed + 4 * eps * right.abs().max() + 1e-30, (error, allowed)
