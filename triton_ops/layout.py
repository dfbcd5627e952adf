"""Neuron-major storage of a down projection: what one neuron owns lies together in memory.

``nn.Linear`` stores a down projection ``[D, F]`` row by row, so the D weights of one neuron are F elements
apart and skipping a neuron saves no memory traffic. Changing the *strides* to ``(1, D)`` puts them side by
side while name, shape, values and saved checkpoints stay as they are.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

_changing = threading.Lock()


def is_neuron_major(weight: Tensor) -> bool:
    """Whether the 2-D ``weight [D, F]`` lies in memory neuron by neuron, with strides ``(1, D)``."""
    if weight.ndim != 2:
        return False
    (rows, columns), (down, across) = weight.shape, weight.stride()
    if (down, across) == (1, rows) or 0 in (rows, columns):
        return True
    # No view is made to ask for: with gradient that locks the weight, and waits for ever for a thread that
    # is just changing its layout.
    return (rows == 1 or down == 1) and (columns == 1 or across == rows)


@torch.no_grad()
def neuron_major_(weight: Tensor) -> Tensor:
    """Store ``weight [D, F]`` neuron by neuron, in place; returns the same tensor, same shape and values.

    The peak of memory is one copy of this weight; afterwards nothing is held twice. Dense products with the
    weight in this layout are slower where the BLAS prefers rows.

    Raises:
        ValueError: ``weight`` is not two-dimensional.

    """
    if weight.ndim != 2:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; a down projection is [hidden, neurons].")
    # Outside of inference mode, also when called in it: a tensor made there could never be trained.
    with _changing, torch.inference_mode(weight.is_inference()):
        if not is_neuron_major(weight):  # else another thread was first, and computes with it already
            weight.data = weight.data.t().contiguous().t()
    return weight


@torch.no_grad()
def stock_layout_(weight: Tensor) -> Tensor:
    """Undo :func:`neuron_major_`, in place: ``weight [D, F]`` as ``nn.Linear`` stores it; returns it."""
    with _changing, torch.inference_mode(weight.is_inference()):
        weight.data = weight.data.contiguous()
    return weight


def as_tokens(x: Tensor) -> Tensor:
    """``[..., n]`` as ``[T, n]``, also for T = 0, where ``reshape(-1, n)`` may be ambiguous."""
    return x.flatten(0, -2) if x.ndim > 1 else x.unsqueeze(0)
