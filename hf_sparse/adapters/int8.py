"""Weights that torchao has rounded to int8 with a scale for each row, as the kernels take them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import triton_ops
from triton_ops import Int8Weight

_OF_WEIGHT = ("qdata", "scale", "block_size")
_OF_INPUT = ("act_quant_kwargs", "act_quant_scale", "act_pre_scale")


def int8_of(weight: object) -> Int8Weight | None:
    """What is in the weight of a linear layer after ``quantize_(model, Int8WeightOnlyConfig())``.

    None of any other weight: of another kind or granularity, or of layers that round or scale their inputs as
    well. Zero points, which are 0 in these, do not count: torchao leaves them out of the product, too. Its
    attributes are looked up where they are: torchao has a function called for each that is asked.
    """
    kind = type(weight)
    if kind.__name__ != "Int8Tensor" or not kind.__module__.startswith("torchao."):
        return None
    own: dict[str, Any] = vars(weight) if not torch.compiler.is_compiling() else _in_graph(weight)
    rows, scale, block = (own.get(name) for name in _OF_WEIGHT)
    if any(own.get(name) is not None for name in _OF_INPUT):
        return None
    if type(rows) is not Tensor or type(scale) is not Tensor or rows.ndim != 2:
        return None
    fits = rows.dtype is torch.int8 and scale.dtype is torch.float32 and scale.numel() == len(rows)
    if not fits or list(block or ()) != [1, rows.shape[1]] or rows.device != scale.device:
        return None
    return Int8Weight(rows, scale.reshape(-1))


def _in_graph(weight: object) -> dict[str, Any]:
    # The compiler knows a tensor by its attributes alone.
    return {name: getattr(weight, name, None) for name in (*_OF_WEIGHT, *_OF_INPUT)}


def fits(weight: Int8Weight, bias: Tensor | None, x: Tensor) -> bool:
    """Whether a kernel, which asks nothing, can multiply ``x [..., F]`` with them."""
    return x.shape[-1] == weight.rows.shape[1] and is_beside(weight, bias, x)


def is_beside(weight: Int8Weight, bias: Tensor | None, x: Tensor) -> bool:
    """Whether they are where ``x`` is, and the bias is one for each row, in the dtype of ``x``."""
    rows = weight.rows
    if bias is None or rows.device != x.device:
        return rows.device == x.device
    return bias.dtype == x.dtype and bias.shape == rows.shape[:1] and bias.device == x.device


def int8_runs(x: Tensor, bias: Tensor | None = None) -> bool:
    """Whether kernels compute with ``x [..., F]`` here: now, or in the graph that is being compiled."""
    if torch.compiler.is_compiling():
        return triton_ops.int8_in_graph(x)
    return triton_ops.int8_kernels(x, bias) is not None


def stored(weight: Tensor) -> Tensor:
    """The tensor in whose memory the weight is: itself, or its rows of int8."""
    held = int8_of(weight)
    return weight if held is None else held.rows
