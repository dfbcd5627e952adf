"""How an MLP skips while it is trained: the whole block as one function of its weights, or not at all."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

import triton_ops
from hf_sparse.modules.sparse_block import Way, backward_hooks_on_all_modules
from triton_ops.choice import autocasts

if TYPE_CHECKING:
    from hf_sparse.modules.sparse_mlp import SparseMLP


def trained_way(block: SparseMLP, x: Tensor) -> Way | None:
    """How to skip in this call, with gradient; None if the block has to run as the stock class does."""
    activation = _activation(block)
    if activation is None or (autocasts(x.device.type) and isinstance(activation[1], Tensor)):
        return None
    read = block.read(x, *block.roles.before_down, block.roles.down, trained=True)
    if read is None:
        return None
    *called, (down, bias) = read
    (first, first_bias), (up, up_bias) = (*block.roles.split(called), (None, None))[:2]
    return Way("trained", weights=(first, up, down, first_bias, up_bias, bias), activation=activation)


def can_be_trained(block: SparseMLP) -> bool:
    """Whether there is such a way for the block as it is now."""
    names = (*block.roles.before_down, block.roles.down)
    first, *others = [block.readable(name, transposed=True) for name in names]
    if _activation(block) is None or first is None or None in others:
        return False
    return triton_ops.skips_in_training(first.weight)


def _activation(block: SparseMLP) -> tuple[str, float] | None:
    """What the kernels call the activation; None if the block must be called with gradient."""
    for module in block._modules.values():
        if module is not None and (module._backward_hooks or module._backward_pre_hooks):
            return None
    activation = None if block.selects or backward_hooks_on_all_modules() else block.kernel()
    learned = activation is not None and getattr(activation[1], "requires_grad", False)
    return None if learned or not block.nothing_else() else activation
