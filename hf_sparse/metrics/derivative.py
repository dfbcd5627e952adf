"""Derivative sparsity: the neurons whose activation has a derivative of exactly zero.

What a backward pass need not compute: three of its four products with the weights depend on it, and only one
on activation sparsity (arXiv 2605.25612, section on derivative sparsity). With ReLU both are the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_sparse.activations import row_of
from hf_sparse.adapters import Block
from hf_sparse.metrics.metric import LayerMetric, Metric
from triton_ops.activations import TABLE


@dataclass(frozen=True, kw_only=True)
class LayerDerivative(LayerMetric):
    """The derivative of one block's activation at the pre-activation: that of the gate, if there is one."""

    zeros: int
    """How many of the ``tokens * neurons`` derivatives are exactly zero."""

    def check(self) -> bool:
        return self.zeros <= self.tokens * self.neurons

    @property
    def sparsity(self) -> float | None:
        """Share of derivatives that are exactly zero; None without tokens."""
        return self.zeros / (self.tokens * self.neurons) if self.tokens else None

    def shares(self) -> dict[str, tuple[float, float] | None]:
        every = self.tokens * self.neurons
        return {"derivative sparsity": (self.zeros, every), "density": (every - self.zeros, every)}


class Derivative(Metric):
    """Counts zeros of the derivative, in the dtype of the pre-activation: what the activation module gets.

    An activation of the operators' table has its slope there. Any other is differentiated by autograd, and
    where it looks at the other neurons of a token, as the statistical top-k does, its derivative is that of
    the sum over the token's activations. Where an activation is written into the forward of a stock block,
    :func:`hf_sparse.measure` raises a ValueError: patched with ``"original"``, it computes the same.
    """

    name = "derivative"
    about = (
        "share of neurons whose activation, of a gated block that of the gate, has a derivative of exactly "
        "zero at the pre-activation"
    )
    site = "p"
    layer = LayerDerivative

    def __init__(self, block: Block) -> None:
        super().__init__(block)
        self._zeros: Tensor | None = None

    def count(self, values: Tensor, routed: bool) -> None:
        known = row_of(self.block.activation)
        if known is not None:
            slope_TF = TABLE[known[0]].slope(values, known[1])
        else:
            slope_TF = _slope(self.block.activation, values)
        zeros = ((slope_TF == 0) & ~values.isnan()).sum()
        self._zeros = zeros if self._zeros is None else self._zeros + zeros

    def result(self) -> LayerDerivative:
        return LayerDerivative(
            **self.about_block(), zeros=0 if self._zeros is None else int(self._zeros.item())
        )


def _slope(activation: nn.Module, p: Tensor) -> Tensor:
    """The derivative of the summed activation in each of ``p [T, F]``, by autograd."""
    with torch.enable_grad():
        p = p.detach().clone().requires_grad_()
        # Its forward and not itself: that has the hook by which p came here. It may work in place.
        a = activation.forward(p.clone())
        (slope,) = torch.autograd.grad(a.sum(), p)
    return slope
