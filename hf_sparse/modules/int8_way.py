"""How an MLP skips whose weights are int8."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from torch import Tensor, nn

from hf_sparse.adapters.int8 import int8_of, int8_runs, is_beside
from hf_sparse.modules.ownership import neuron_major
from hf_sparse.modules.sparse_block import Way, hooks_on_all_modules
from hf_sparse.modules.surroundings import only_multiplies
from triton_ops import Int8Weight

if TYPE_CHECKING:
    from hf_sparse.modules.sparse_mlp import SparseMLP


def int8_layer(linear: nn.Module) -> tuple[Int8Weight, Tensor | None] | None:
    """Weight and bias of a linear layer, if the weight is int8 and may be read."""
    if hooks_on_all_modules() or not only_multiplies(linear):
        return None
    held = int8_of(linear._parameters.get("weight"))
    return None if held is None else (held, linear._parameters["bias"])


def int8_way(block: SparseMLP, x: Tensor) -> Way | None:
    """How to skip in this call, if the down projection may be stored neuron by neuron; None if it cannot."""
    roles, activation = block.roles, None if block.selects else block.kernel()
    if activation is None or not int8_runs(x):
        return None
    held = [int8_layer(cast(nn.Module, block._modules[name])) for name in (*roles.before_down, roles.down)]
    if any(one is None or not is_beside(*one, x) for one in held):
        return None
    *called, ((down, scale), bias) = cast("list[tuple[Int8Weight, Tensor | None]]", held)
    rows = roles.split([(weight.rows, b) for weight, b in called])
    scales = roles.split([(weight.scale, None) for weight, _ in called])
    lent = neuron_major(down)
    if lent is None:
        return None
    layers = [(Int8Weight(w, s), b) for (w, b), (s, _) in zip(rows, scales, strict=True)]
    (first, first_bias), (up, up_bias) = (*layers, (None, None))[:2]
    weights = (first, up, Int8Weight(lent, scale), first_bias, up_bias, bias)
    return Way("int8", weights=weights, activation=activation)
