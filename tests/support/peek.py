"""The state of a patched model's blocks, read without reaching their weights, which would end it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import triton_ops
from hf_sparse.modules import SparseBlock, SparseLinear


def sparse_blocks(module: nn.Module) -> Iterator[SparseBlock | SparseLinear]:
    """The sparse blocks in a module, in the order of the model; of those that stay, the down projections."""
    if isinstance(module, SparseBlock | SparseLinear):
        yield module
        return
    for child in vars(module)["_modules"].values():
        yield from sparse_blocks(child)


def down_weight(block: SparseBlock | SparseLinear) -> Tensor:
    own = vars(block)
    name = "weight" if isinstance(block, SparseLinear) else block.roles.down
    stacked = own["_parameters"].get(name)
    return own["_modules"][name].weight if stacked is None else stacked


def zeroth_biases(model: nn.Module) -> list[Tensor]:
    """The tables of zeroth biases in a model, in its order."""
    return [table for name, table in model.named_parameters() if "zeroth_bias" in name]


def layouts(model: nn.Module) -> set[bool]:
    """Whether down projections are stored neuron by neuron."""
    return {triton_ops.is_neuron_major(down_weight(block)) for block in sparse_blocks(model)}


def certified(model: nn.Module) -> list[bool]:
    """By block, whether it holds a certificate."""
    return [block._certified._held is not None for block in sparse_blocks(model)]


def assert_same_while_others_look(model: nn.Module, call: Callable[[], Tensor], expected: Tensor) -> None:
    """What ``call`` decodes is right, whatever layout it meets, while a thread reaches all parameters."""
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            list(model.parameters())

    thread = threading.Thread(target=look)
    thread.start()
    try:
        with triton_ops.backend("torch"):
            for _ in range(300):
                torch.testing.assert_close(call(), expected)
    finally:
        stop.set()
        thread.join()
