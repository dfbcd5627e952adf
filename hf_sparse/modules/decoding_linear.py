"""``nn.Linear`` that multiplies a few tokens at the speed of memory, for a model that decodes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import triton_ops
from hf_sparse.adapters.walk import modules_of
from hf_sparse.modules.surroundings import is_plain, with_own_forward
from triton_ops.dense_linear import quick

_LINEAR = F.linear


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear``; by :func:`triton_ops.linear` where that is no slower and nobody could tell.

    Who counts, traces, differentiates or replaces calls of ``F.linear`` sees that one. So does who exports a
    graph, which is to run without this package.
    """
    if torch.compiler.is_compiling():
        return _in_graph(x, weight, bias)
    multiply = quick(x, weight, bias) if F.linear is _LINEAR else None
    return F.linear(x, weight, bias) if multiply is None else multiply(x, weight, bias)


def _in_graph(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if torch.is_grad_enabled() or torch.compiler.is_exporting() or not is_plain(weight):
        return F.linear(x, weight, bias)
    alike = x.dtype == weight.dtype and x.device == weight.device and x.shape[-1:] == weight.shape[1:]
    if not alike or not weight.numel() or (bias is not None and bias.dtype != x.dtype):
        return F.linear(x, weight, bias)
    backend = triton_ops.plan(weight, "dense_linear").backend(x.numel() // weight.shape[1])
    if backend == triton_ops.DENSE:
        return F.linear(x, weight, bias)
    return triton_ops.linear(x, weight, bias, backend=backend)


@with_own_forward
class DecodingLinear(nn.Linear):
    """What a stock ``nn.Linear`` is made into by its class; the object and all in it stay."""

    def forward(self, input: Tensor) -> Tensor:
        """``input [..., F]`` to ``[..., D]``, any dtype."""
        own = self._parameters
        weight = own.get("weight")
        if weight is None:  # pruned, say: it is an attribute, or nothing
            return super().forward(input)
        return product(input, weight, own.get("bias"))


def is_linear(module: nn.Module | None) -> TypeGuard[nn.Linear]:
    """Whether it is a linear layer and nothing else."""
    return type(module) in (nn.Linear, DecodingLinear)


def decode_linears(model: nn.Module) -> None:
    """Make every plain linear layer of ``model`` a :class:`DecodingLinear`."""
    for linear in _of(model, nn.Linear):
        if "forward" not in vars(linear) and is_plain(linear._parameters.get("weight")):
            object.__setattr__(linear, "__class__", DecodingLinear)


def stock_linears(model: nn.Module) -> None:
    """Undo :func:`decode_linears`."""
    for linear in _of(model, DecodingLinear):
        object.__setattr__(linear, "__class__", nn.Linear)


def _of(model: nn.Module, cls: type[nn.Linear]) -> Iterator[nn.Linear]:
    for module in modules_of(model):
        if type(module) is cls:
            yield module
