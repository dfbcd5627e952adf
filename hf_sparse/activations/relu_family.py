"""The activations of the ReLU family that transformers does not have. All are elementwise and keep NaN."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ShiftedReLU(nn.Module):
    """``max(p - shift, 0)`` (ReLU Strikes Back, arXiv 2310.04564)."""

    def __init__(self, shift: float) -> None:
        super().__init__()
        self.shift = shift

    def forward(self, p: Tensor) -> Tensor:
        """Any shape and floating dtype to the same."""
        return torch.relu(p - self.shift)

    def extra_repr(self) -> str:
        return f"shift={self.shift}"


class FATReLU(nn.Module):
    """``p if p >= threshold else 0`` (ProSparse, arXiv 2402.13516, section on threshold shift).

    The gradient is 1 where ``p >= threshold`` and 0 elsewhere; the jump at the threshold has none.
    """

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold

    def forward(self, p: Tensor) -> Tensor:
        """Any shape and floating dtype to the same."""
        # masked_fill and not where(p >= t): a NaN must come through, not turn into a silent neuron.
        return p.masked_fill(p < self.threshold, 0)

    def compared(self, p: Tensor) -> Tensor:
        """What is silent below the threshold, ``max(p, 0)``."""
        return torch.relu(p)

    def extra_repr(self) -> str:
        return f"threshold={self.threshold}"


class JSReLU(nn.Module):
    """J-SquaredReLU, ``p + p**2 / 2 if p >= 0 else 0`` (arXiv 2605.25612).

    Its derivative jumps from 0 to 1 at zero as ReLU's does and then grows as ``1 + p``.
    """

    def forward(self, p: Tensor) -> Tensor:
        """Any shape and floating dtype to the same."""
        r = torch.relu(p)
        return r + 0.5 * r.square()


class JSReLULinear(JSReLU):
    """J-SquaredReLU up to 4, and its tangent ``12 + 5 * (p - 4)`` beyond: the slope is at most 5.

    The numerically controlled variant in the code of arXiv 2605.25612.
    """

    def forward(self, p: Tensor) -> Tensor:
        """Any shape and floating dtype to the same."""
        d = torch.relu(p - 4)
        # Not 5 * d, which a compiler may round once less: all backends are to have the same bits.
        return super().forward(p.clamp(max=4)) + (4 * d + d)
