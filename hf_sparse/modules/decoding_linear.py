"""``nn.Linear`` that multiplies a few tokens at the speed of memory, for a model that decodes."""

from __future__ import annotations

from types import MethodType
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import triton_ops
from hf_sparse.adapters.int8 import fits, int8_of, int8_runs
from hf_sparse.adapters.walk import modules_of
from hf_sparse.errors import PatchError
from hf_sparse.modules.surroundings import is_plain, with_own_forward
from triton_ops.dense_linear import quick
from triton_ops.layout import view_of
from triton_ops.ops import in_inference_graph

_LINEAR = F.linear
_FORWARD = nn.Linear.forward


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear``; by :func:`triton_ops.linear` where that is no slower and nobody could tell.

    Who counts, traces, differentiates or replaces calls of ``F.linear`` sees that one. So does who exports a
    graph, which is to run without this package.
    """
    if F.linear is not _LINEAR:
        return F.linear(x, weight, bias)
    if torch.compiler.is_compiling():
        return _in_graph(x, weight, bias)
    if type(weight) not in (nn.Parameter, Tensor):
        return _of_int8(x, weight, bias)
    backend = quick(x, weight, bias)
    if backend is None or backend.linear is None:
        return F.linear(x, weight, bias)
    # A view: the layout of a down projection may be changed by another thread meanwhile.
    return backend.linear(x, view_of(weight), bias)


def _of_int8(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    kernels, held = triton_ops.int8_kernels(x, bias), int8_of(weight)
    if kernels is None or kernels.int8_linear is None or held is None or not fits(held, bias, x):
        return F.linear(x, weight, bias)
    return kernels.int8_linear(x, held, bias)


def _in_graph(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if not in_inference_graph():
        return F.linear(x, weight, bias)
    if not is_plain(weight):
        held = int8_of(weight) if int8_runs(x) else None
        if held is None or not fits(held, bias, x):
            return F.linear(x, weight, bias)
        return triton_ops.int8_linear(x, held, bias)
    alike = x.dtype == weight.dtype and x.device == weight.device and x.shape[-1:] == weight.shape[1:]
    if not alike or not weight.numel() or (bias is not None and bias.dtype != x.dtype):
        return F.linear(x, weight, bias)
    backend = triton_ops.plan(weight, "dense_linear").backend(x.numel() // weight.shape[1])
    if backend == triton_ops.DENSE:
        return F.linear(x, weight, bias)
    return triton_ops.linear(x, weight, bias, backend=backend)


_ours: set[type[nn.Module]] = set()


def of_ours(cls: type[DecodingLinear]) -> type[DecodingLinear]:
    """Mark :class:`DecodingLinear`, or a subclass of this package, as what a stock layer may be made into."""
    _ours.add(cls)
    return with_own_forward(cls)


@of_ours
class DecodingLinear(nn.Linear):
    """What a stock ``nn.Linear`` is made into by its class; the object and all in it stay."""

    def forward(self, input: Tensor) -> Tensor:
        """``input [..., F]`` to ``[..., D]``, any dtype."""
        own = self._parameters
        # What is pruned or parametrised is an attribute and no parameter.
        if own.get("weight") is None or "bias" not in own or nn.Linear.forward is not _FORWARD:
            return nn.Linear.forward(self, input)
        return product(input, own["weight"], own["bias"])  # type: ignore[arg-type]

    def multiplied(self, input: Tensor) -> tuple[Tensor, Tensor | None] | None:
        """Weight and bias, if a kernel is what :meth:`forward` multiplies ``input`` with them by."""
        own, replaced = self._parameters, nn.Linear.forward is not _FORWARD or F.linear is not _LINEAR
        weight = own.get("weight")
        if weight is None or "bias" not in own or replaced or type(weight) not in (nn.Parameter, Tensor):
            return None
        return None if quick(input, weight, own["bias"]) is None else (weight, own["bias"])


def is_linear(module: nn.Module | None) -> TypeGuard[nn.Linear]:
    """Whether it is a linear layer and nothing else."""
    return type(module) is nn.Linear or type(module) in _ours


def decode_linears(model: nn.Module) -> None:
    """Make every plain linear layer of ``model`` a :class:`DecodingLinear`."""
    for linear in modules_of(model):
        if type(linear) is not nn.Linear or "forward" in vars(linear):
            continue
        weight = linear._parameters.get("weight")
        if is_plain(weight) or int8_of(weight) is not None:
            object.__setattr__(linear, "__class__", DecodingLinear)


def stock_linears(model: nn.Module) -> None:
    """Undo :func:`decode_linears`; :func:`require_stock_linears` is called before."""
    for linear in modules_of(model):
        if type(linear) in _ours:
            become(linear, nn.Linear)


def become(linear: nn.Module, cls: type[nn.Linear]) -> None:
    """Make ``linear`` one of ``cls``, nn.Linear or of ours, which it is one of already."""
    before = type(linear).forward
    object.__setattr__(linear, "__class__", cls)
    for name in ("forward", "_old_forward"):  # accelerate's hooks keep what they have found
        if getattr(vars(linear).get(name), "__func__", None) is before:
            vars(linear)[name] = MethodType(cls.forward, linear)


def require_stock_linears(model: nn.Module) -> None:
    """See to it that :func:`stock_linears` can put all back.

    Raises:
        PatchError: a tool has made a class of its own of a :class:`DecodingLinear`.

    """
    for module in modules_of(model):
        if isinstance(module, DecodingLinear) and type(module) not in _ours:
            raise of_another_class(module)


def of_another_class(linear: nn.Linear) -> PatchError:
    """What is raised where a tool has made a class of its own of one of ours."""
    return PatchError(
        f"the parameters of a linear layer {linear.in_features} -> {linear.out_features} are "
        "parametrised, or sharded by themselves; remove that first."
    )
