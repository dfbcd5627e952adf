"""Who else holds a weight, or its memory; and the layout for decoding, which is lent and given back.

A weight's storage and strides belong to whoever trains, shards, shares or saves it. Fused optimizers read a
parameter, its gradient and their own state as if all had the same strides; FSDP and DeepSpeed gather into
buffers of their own; ``safetensors`` and ``Tensor.view`` want rows. So a down projection is stored neuron by
neuron only while it is nobody's business:

- :func:`lend` does it, to memory that no other tensor shares, of a weight without a gradient;
- :func:`give_back` undoes it. Blocks call it before anybody reaches their weights through the module tree
  (:mod:`hf_sparse.modules.guarded`), in training mode and in every forward with gradient; and for those who
  hold the parameter itself, as optimizers do, it is called before each ``step`` of any optimizer of torch's
  base class.

Where that cannot be known the weight stays as it is.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

import triton_ops
from triton_ops.layout import stock_layout_

_lent: dict[int, weakref.ref[Tensor]] = {}
"""The weights that are stored neuron by neuron now, by ``id``."""
_watching_steps = False


def lend(weight: Tensor) -> Tensor | None:
    """``weight [D, F]`` stored neuron by neuron, as a tensor of its own on the same memory.

    A view, for the weight may be given back by another thread while a kernel reads. None if the layout is not
    ours to change, and on the meta device.
    """
    if not triton_ops.is_neuron_major(weight):
        if weight.is_meta or weight.grad is not None or not shares_nothing(weight):
            return None
        _watch_steps()
        key = id(weight)
        _lent[key] = weakref.ref(weight, lambda _: _lent.pop(key, None))
        triton_ops.neuron_major_(weight)
    return weight.detach()


def give_back(weight: Tensor) -> None:
    """Store ``weight`` as ``nn.Linear`` does, if it was lent; values and shape stay."""
    if not is_lent(weight):
        return
    del _lent[id(weight)]
    stock_layout_(weight)
    # Backward gives a gradient the strides that the weight has just then.
    if weight.grad is not None and not weight.grad.is_contiguous():
        weight.grad = weight.grad.contiguous()


def is_lent(weight: Tensor) -> bool:
    """Whether ``weight`` is stored neuron by neuron because :func:`lend` did so."""
    held = _lent.get(id(weight))
    return held is not None and held() is weight and triton_ops.is_neuron_major(weight)


def shares_nothing(weight: Tensor) -> bool:
    """Whether no other tensor, array or process holds the memory of ``weight``, as far as torch knows.

    Views, detached tensors (a state dict that somebody keeps), buffers that it was gathered into, shared
    memory; False where torch cannot tell.
    """
    storage = weight.untyped_storage()
    if weight.device.type == "cpu" and storage.is_shared():
        return False
    return _uses(storage) == _USES_ALONE


def held_elsewhere(holder: Mapping[Any, object] | Sequence[object], key: Any, holders: int = 1) -> bool:
    """Whether anybody else than ``holders`` containers, ``holder`` among them, refers to ``holder[key]``.

    So does who took it long ago: a list of parameters, an optimizer, a variable. To be asked while no
    variable of the caller refers to it.
    """
    return sys.getrefcount(holder[key]) > _REFERENCES_ALONE - 1 + holders


def _uses(storage: torch.UntypedStorage) -> int | None:
    # Not public. A torch without it cannot tell, and then nothing is lent.
    count = getattr(torch._C, "_storage_Use_Count", None)
    return None if count is None else count(storage._cdata)


_lone = {"tensor": torch.empty(1)}
_USES_ALONE = _uses(_lone["tensor"].untyped_storage()) or -1
_REFERENCES_ALONE = sys.getrefcount(_lone["tensor"])


def _watch_steps() -> None:
    global _watching_steps
    if not _watching_steps:
        register_optimizer_step_pre_hook(_before_step)
        _watching_steps = True


def _before_step(optimizer: Optimizer, *_: Any) -> None:
    if not _lent:
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            give_back(parameter)
