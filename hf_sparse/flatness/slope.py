"""The derivative of an activation, whatever it is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def slope(activation: nn.Module, p: Tensor) -> Tensor:
    """``σ'(p)``: ``p [..., F]`` to the same shape and dtype, as autograd computes it, 0 at the kink of ReLU.

    That of an elementwise ``activation``; of another, the sums of the columns of its Jacobian.
    """
    with torch.inference_mode(False), torch.enable_grad():
        p = p.detach().clone().requires_grad_()
        module: Any = activation
        a = module.forward(p)  # a call would be seen by whoever watches the block
        return torch.autograd.grad(a, p, torch.ones_like(a))[0]
