"""Random MLP blocks for the kernel tests, and the error bound that every kernel keeps."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from triton_ops import certify, neuron_major_, reference
from triton_ops.activations import TABLE

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"


def typical_threshold(activation: str) -> float:
    """A value for the parameter of an activation, for pre-activations of deviation 1; 0 if it has none."""
    return 0.25 if TABLE[activation].parameter else 0.0


@dataclass
class Block:
    """The arguments of ``gated_mlp``, or, with ``gate`` None, of ``plain_mlp``."""

    x: Tensor
    gate: Tensor | None
    up: Tensor
    down: Tensor
    gate_bias: Tensor | None
    up_bias: Tensor | None
    down_bias: Tensor | None
    activation: str
    threshold: float | Tensor
    certified: bool = False

    def tensors(self) -> list[Tensor | None]:
        """Those of the operator, in its order."""
        if self.gate is None:
            return [self.x, self.up, self.down, self.up_bias, self.down_bias]
        return [self.x, self.gate, self.up, self.down, self.gate_bias, self.up_bias, self.down_bias]

    @property
    def deciding(self) -> Tensor:
        """The projection that decides which neurons are active."""
        return self.up if self.gate is None else self.gate

    @property
    def deciding_bias(self) -> Tensor | None:
        return self.up_bias if self.gate is None else self.gate_bias

    def run(self, module: Any, dtype: torch.dtype | None = None) -> Tensor:
        """The operator of this block in ``triton_ops`` or ``triton_ops.reference``, in ``dtype`` if given."""
        operator = module.plain_mlp if self.gate is None else module.gated_mlp
        tensors = [t if t is None or dtype is None else t.to(dtype) for t in self.tensors()]
        threshold = self.threshold
        if isinstance(threshold, Tensor) and dtype is not None:
            threshold = threshold.to(dtype)
        options = {"activation": self.activation, "threshold": threshold}
        if self.certified and module is not reference:
            options["certificate"] = certify(self.deciding)
        return operator(*tensors, **options)


def make_block(
    tokens: int,
    hidden: int,
    neurons: int,
    dtype: torch.dtype,
    activation: str = "relu",
    *,
    gated: bool = True,
    bias: bool = False,
    certified: bool = False,
    device: str = "cpu",
) -> Block:
    def rand(*shape: int, fan_in: int = 1) -> Tensor:
        return (torch.randn(*shape) * fan_in**-0.5).to(device, dtype)

    return Block(
        x=rand(tokens, hidden),
        gate=rand(neurons, hidden, fan_in=hidden) if gated else None,
        up=rand(neurons, hidden, fan_in=hidden),
        down=neuron_major_(rand(hidden, neurons, fan_in=neurons)),
        gate_bias=rand(neurons) if bias and gated else None,
        up_bias=rand(neurons) if bias else None,
        down_bias=rand(hidden) if bias else None,
        activation=activation,
        threshold=typical_threshold(activation),
        certified=certified,
    )


def assert_as_exact_as_dense(y: Tensor, block: Block) -> None:
    """The promise of the skip path: an error against float64 of at most twice that of the dense computation.

    Three allowances. One rounding of the largest output to its dtype and a few in float32: in a small block
    the dense error can happen to be next to nothing. Where there are only a few outputs it often is, and
    there one float32 rounding of the sum of the absolute terms is allowed as well. For an activation that
    jumps at its threshold, what the neurons are worth whose pre-activation in float64 lies within rounding of
    it: either side of the jump is a correct rounding of its argument.
    """
    exact = block.run(reference, torch.float64)
    dense = block.run(reference)
    assert y.dtype == dense.dtype
    assert y.shape == dense.shape
    assert y.is_contiguous()
    assert not torch.isnan(y).any()
    if not y.numel():
        return
    eps = torch.finfo(y.dtype).eps
    rounding = eps + 4 * torch.finfo(torch.float32).eps
    allowed = 2 * (dense.double() - exact).abs().max() + rounding * exact.abs().max()
    if y.numel() < 64:
        allowed = allowed + torch.finfo(torch.float32).eps * _magnitude(block)
    allowed = allowed + _jumps(block, eps)
    error = (y.double() - exact).abs()
    worst = (error - allowed).max().item()
    assert worst <= 0, f"error {error.max():.3g}, dense {(dense.double() - exact).abs().max():.3g}"


def _magnitude(block: Block) -> Tensor:
    """The sum of the absolute terms of each output, those of its pre-activations included.

    Where a shift is taken from a pre-activation, little may be left but its rounding.
    """
    p = _linear(block.x, block.deciding, block.deciding_bias)
    bias = block.deciding_bias
    terms = _linear(block.x.abs(), block.deciding.abs(), None if bias is None else bias.abs())
    a = TABLE[block.activation].value(p, _threshold(block))
    a = torch.maximum(a.abs(), terms * (a != 0))
    if block.gate is not None:
        a = a * _linear(block.x, block.up, block.up_bias)
    return a.abs() @ block.down.double().abs().t()


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())


def _threshold(block: Block) -> float | Tensor:
    return block.threshold.double() if isinstance(block.threshold, Tensor) else block.threshold


def _jumps(block: Block, eps: float) -> Tensor:
    """What may be gained or lost of each output at jumps: 0 for an activation that has none."""
    p = _linear(block.x, block.deciding, block.deciding_bias)
    value, t = TABLE[block.activation].value, _threshold(block)
    whole, cut = value(p, 0.0), value(p, t)
    if not torch.equal(cut, whole.masked_fill(cut == 0, 0)):
        return torch.zeros(())
    # Slopes are at most 1.2.
    uncertain = (whole.abs() - t).abs() <= 2.4 * eps * (
        block.x.double().abs() @ block.deciding.double().abs().t() + 1
    )
    worth = uncertain * whole
    if block.gate is not None:
        worth = worth * _linear(block.x, block.up, block.up_bias)
    return worth.abs() @ block.down.double().abs().t()
