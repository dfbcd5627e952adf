"""The state of a patched model's blocks, read without reaching their weights, which would end it."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

import triton_ops
from hf_sparse.modules import SparseBlock


def sparse_blocks(module: nn.Module) -> Iterator[SparseBlock]:
    """The sparse blocks in a module, in the order of the model."""
    if isinstance(module, SparseBlock):
        yield module
        return
    for child in vars(module)["_modules"].values():
        yield from sparse_blocks(child)


def down_weight(block: SparseBlock) -> Tensor:
    own = vars(block)
    stacked = own["_parameters"].get(block.roles.down)
    return own["_modules"][block.roles.down].weight if stacked is None else stacked


def layouts(model: nn.Module) -> set[bool]:
    """Whether down projections are stored neuron by neuron."""
    return {triton_ops.is_neuron_major(down_weight(block)) for block in sparse_blocks(model)}


def certified(model: nn.Module) -> list[bool]:
    """By block, whether it holds a certificate."""
    return [block._certified._held is not None for block in sparse_blocks(model)]
