"""Random MLP blocks for the kernel tests, and the error bound that every kernel keeps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from triton_ops import neuron_major_, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
THRESHOLDS = {"shifted_relu": 0.25, "fatrelu": 0.5}


@dataclass
class Block:
    """The arguments of ``gated_mlp``."""

    x: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor
    gate_bias: Tensor | None
    up_bias: Tensor | None
    down_bias: Tensor | None
    activation: str
    threshold: float

    def tensors(self) -> list[Tensor | None]:
        return [self.x, self.gate, self.up, self.down, self.gate_bias, self.up_bias, self.down_bias]

    def run(self, operator: Callable[..., Tensor], dtype: torch.dtype | None = None) -> Tensor:
        tensors = [t if t is None or dtype is None else t.to(dtype) for t in self.tensors()]
        return operator(*tensors, activation=self.activation, threshold=self.threshold)


def make_block(
    tokens: int,
    hidden: int,
    neurons: int,
    dtype: torch.dtype,
    activation: str = "relu",
    *,
    bias: bool = False,
    device: str = "cpu",
) -> Block:
    def rand(*shape: int, fan_in: int = 1) -> Tensor:
        return (torch.randn(*shape) * fan_in**-0.5).to(device, dtype)

    return Block(
        x=rand(tokens, hidden),
        gate=rand(neurons, hidden, fan_in=hidden),
        up=rand(neurons, hidden, fan_in=hidden),
        down=neuron_major_(rand(hidden, neurons, fan_in=neurons)),
        gate_bias=rand(neurons) if bias else None,
        up_bias=rand(neurons) if bias else None,
        down_bias=rand(hidden) if bias else None,
        activation=activation,
        threshold=THRESHOLDS.get(activation, 0.0),
    )


def assert_as_exact_as_dense(y: Tensor, block: Block) -> None:
    """The promise of the skip path: an error against float64 of at most twice that of the dense computation.

    Two allowances. One rounding of the largest output to its dtype and a few in float32: in a small block
    the dense error can happen to be next to nothing. For fatrelu, what the neurons are worth whose
    pre-activation in float64 lies within rounding of the threshold: the function jumps there, and either side
    of the jump is a correct rounding of its argument.
    """
    exact = block.run(reference.gated_mlp, torch.float64)
    dense = block.run(reference.gated_mlp)
    assert y.dtype == dense.dtype
    assert y.shape == dense.shape
    assert y.is_contiguous()
    assert not torch.isnan(y).any()
    if not y.numel():
        return
    eps = torch.finfo(y.dtype).eps
    rounding = eps + 4 * torch.finfo(torch.float32).eps
    allowed = 2 * (dense.double() - exact).abs().max() + rounding * exact.abs().max()
    if block.activation == "fatrelu":
        allowed = allowed + _jumps(block, eps)
    error = (y.double() - exact).abs()
    worst = (error - allowed).max().item()
    assert worst <= 0, f"error {error.max():.3g}, dense {(dense.double() - exact).abs().max():.3g}"


def _jumps(block: Block, eps: float) -> Tensor:
    x, gate, up, down, gate_bias, up_bias, _ = (None if t is None else t.double() for t in block.tensors())
    assert x is not None
    assert gate is not None
    assert up is not None
    assert down is not None
    p = torch.nn.functional.linear(x, gate, gate_bias)
    u = torch.nn.functional.linear(x, up, up_bias)
    uncertain = (p - block.threshold).abs() <= 2 * eps * (x.abs() @ gate.abs().t() + 1)
    return (uncertain * p * u).abs() @ down.abs().t()
