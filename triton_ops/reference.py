"""The oracle: every operator of this package in plain PyTorch, to be read in one sitting.

The kernels are tested against these functions in float64. They make the torch calls of a stock Hugging Face
MLP, and the dense backend gives the same bits.

Shapes: T tokens (any number of leading dimensions), D hidden size, F neurons.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = ("relu", "relu2", "jsrelu", "shifted_relu", "fatrelu", "drelu")
"""Names of the activations that the operators know."""

THRESHOLDED = ("shifted_relu", "fatrelu")
"""The activations that read ``threshold``; for the others it must be 0."""


def check_activation(kind: str, threshold: float, *, gated: bool = True) -> None:
    """Raise ValueError if ``kind`` is unknown or needs a gate, or ``threshold`` is out of its range."""
    if kind not in ACTIVATIONS:
        raise ValueError(f"activation={kind!r} is not known; choose one of {', '.join(ACTIVATIONS)}.")
    if threshold != 0 and kind not in THRESHOLDED:
        raise ValueError(
            f"threshold={threshold} has no meaning for activation={kind!r}; leave it at 0 or use one of "
            f"{', '.join(THRESHOLDED)}."
        )
    if kind == "drelu" and not gated:
        raise ValueError("activation='drelu' needs a gate and an up projection; use 'relu' in a plain MLP.")
    if kind == "fatrelu" and not threshold >= 0:
        raise ValueError(f"threshold={threshold} is not valid for fatrelu; it is at least 0.")


def activation(p: Tensor, kind: str, threshold: float = 0.0) -> Tensor:
    """The activation of pre-activations ``p``, any shape and floating dtype to the same.

    ==================  ======================================  =====================
    ``kind``            value                                   silent (exact 0) when
    ==================  ======================================  =====================
    ``"relu"``          ``p``                                   ``p <= 0``
    ``"relu2"``         ``p**2``                                ``p <= 0``
    ``"jsrelu"``        ``p + p**2 / 2``                        ``p <= 0``
    ``"shifted_relu"``  ``p - threshold``                       ``p <= threshold``
    ``"fatrelu"``       ``p``                                   ``p < threshold``
    ``"drelu"``         ``p`` (for the gate and for the up)     ``p <= 0``
    ==================  ======================================  =====================

    NaN is never silent: it comes through. The threshold counts in the dtype of ``p``.
    """
    if kind in ("relu", "drelu"):
        return torch.relu(p)
    if kind == "relu2":
        return torch.relu(p).square()
    if kind == "jsrelu":
        r = torch.relu(p)
        return r + 0.5 * r.square()
    if kind == "shifted_relu":
        return torch.relu(p - threshold)
    if kind == "fatrelu":
        return p.masked_fill(p < threshold, 0)
    raise ValueError(f"activation={kind!r} is not known; choose one of {', '.join(ACTIVATIONS)}.")


def activation_derivative(p: Tensor, kind: str, threshold: float = 0.0) -> Tensor:
    """Slope of :func:`activation` at ``p``, with 0 at the kink; it is what autograd computes."""
    if kind in ("relu", "drelu"):
        return (p > 0).to(p.dtype)
    if kind == "relu2":
        return 2 * torch.relu(p)
    if kind == "jsrelu":
        return (p > 0).to(p.dtype) + torch.relu(p)
    if kind == "shifted_relu":
        return (p - threshold > 0).to(p.dtype)
    if kind == "fatrelu":
        return torch.ones_like(p).masked_fill(p < threshold, 0)
    raise ValueError(f"activation={kind!r} is not known; choose one of {', '.join(ACTIVATIONS)}.")


def gated_mlp(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    *,
    activation: str,
    threshold: float = 0.0,
) -> Tensor:
    """The gated MLP, ``down(act(gate(x)) * up(x))``, dense.

    Args:
        x: ``[..., D]``.
        gate: ``[F, D]``.
        up: ``[F, D]``.
        down: ``[D, F]``, of any strides.
        gate_bias: ``[F]`` or None.
        up_bias: ``[F]`` or None.
        down_bias: ``[D]`` or None.
        activation: one of :data:`ACTIVATIONS`.
        threshold: of ``"shifted_relu"`` and ``"fatrelu"``, in units of the pre-activation.

    Returns:
        ``[..., D]``.

    """
    u = F.linear(x, up, up_bias)
    h = _activation(F.linear(x, gate, gate_bias), activation, threshold)
    h = h * (torch.relu(u) if activation == "drelu" else u)
    return sparse_linear(h, down, down_bias)


def plain_mlp(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    *,
    activation: str,
    threshold: float = 0.0,
) -> Tensor:
    """The plain MLP, ``down(act(up(x)))``, dense; arguments as in :func:`gated_mlp`, without a gate."""
    h = _activation(F.linear(x, up, up_bias), activation, threshold)
    return sparse_linear(h, down, down_bias)


def sparse_linear(h: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``h weightᵀ + bias``: ``h [..., F]`` (kernels skip its exact zeros), ``weight [D, F]``."""
    return F.linear(h, weight, bias)


_activation = activation  # the keyword argument of gated_mlp has the same name
