"""Neuron-major storage of a down projection: what one neuron owns lies together in memory.

``nn.Linear`` stores a down projection ``[D, F]`` row by row, so the D weights of one neuron are F elements
apart and skipping a neuron saves no memory traffic. Changing the *strides* to ``(1, D)`` puts them side by
side while name, shape, values and saved checkpoints stay as they are.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

_changing = threading.Lock()
if hasattr(os, "register_at_fork"):  # another thread of the parent may have held it
    os.register_at_fork(after_in_child=_changing._at_fork_reinit)  # type: ignore[attr-defined]
unseen: Callable[[], AbstractContextManager[None]] = nullcontext
"""In here no operator in C++ looks at a weight: they do not hold the interpreter's lock."""


def is_neuron_major(weight: Tensor) -> bool:
    """Whether ``weight [D, F]``, or of experts ``[E, D, F]``, lies in memory neuron by neuron."""
    if weight.ndim not in (2, 3):
        return False
    # Asked without a view: one that is made with gradient takes a lock of the weight while it waits for the
    # interpreter's, and another thread that sets ``weight.data`` holds that and waits for the weight's.
    shape, strides, step = weight.shape, weight.stride(), 1
    for dim in (-2, -1, -3)[: weight.ndim]:
        if shape[dim] != 1 and strides[dim] != step:
            return not weight.numel()
        step *= shape[dim]
    return True


def view_of(weight: Tensor) -> Tensor:
    """A tensor on the memory of ``weight``, before or after another thread changes its layout."""
    with _changing:
        return weight.detach()


@torch.no_grad()
def neuron_major_(weight: Tensor) -> Tensor:
    """Store ``weight [D, F]`` or ``[E, D, F]`` neuron by neuron, in place; the same tensor, shape and values.

    The peak of memory is one copy of this weight; afterwards nothing is held twice. Dense products with the
    weight in this layout are slower where the BLAS prefers rows.

    Raises:
        ValueError: ``weight`` has another number of dimensions.

    """
    if weight.ndim not in (2, 3):
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}; a down projection is [hidden, neurons], or "
            "[experts, hidden, neurons]."
        )
    # Outside of inference mode, also when called in it: a tensor made there could never be trained.
    with _changing, torch.inference_mode(weight.is_inference()):
        if not is_neuron_major(weight):  # else another thread was first, and computes with it already
            _swap(weight, weight.data.transpose(-1, -2).contiguous().transpose(-1, -2))
    return weight


@torch.no_grad()
def stock_layout_(weight: Tensor) -> Tensor:
    """Undo :func:`neuron_major_`, in place: ``weight`` row by row, as ``nn.Linear`` stores it; returns it."""
    with _changing, torch.inference_mode(weight.is_inference()):
        _swap(weight, weight.data.contiguous())
    return weight


def _swap(weight: Tensor, data: Tensor) -> None:
    with unseen():
        weight.data = data


def as_tokens(x: Tensor) -> Tensor:
    """``[..., n]`` as ``[T, n]``, also for T = 0, where ``reshape(-1, n)`` may be ambiguous."""
    return x.flatten(0, -2) if x.ndim > 1 else x.unsqueeze(0)
