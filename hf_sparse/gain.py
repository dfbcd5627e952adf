"""What sparsity is worth where it counts: one MLP at the size of a real model, dense against skipping."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

import triton_ops
from triton_ops import Problem, reference
from triton_ops.cpu.products import has_bfloat16_products
from triton_ops.tune import available
from triton_ops.tune import measure as measure_shape

MODEL, HIDDEN, NEURONS = "Llama-3.2-1B", 2048, 8192


@dataclass(frozen=True, kw_only=True)
class Gain:
    """Times of one gated MLP for one token, with random weights; prints as one line."""

    hidden: int
    neurons: int
    sparsity: float
    """Share of silent neurons."""
    dtype: str
    device: str
    """Name of the GPU, or the number of threads."""
    backend: str
    dense_ms: float
    """Of PyTorch in the same dtype on stock weights; median."""
    sparse_ms: float
    """Median, taken by turns with the other."""

    @property
    def ratio(self) -> float:
        """How many times faster skipping is."""
        return self.dense_ms / self.sparse_ms

    def __str__(self) -> str:
        stock = (self.hidden, self.neurons) == (HIDDEN, NEURONS)
        size = f"the size of {MODEL}" if stock else f"{self.hidden} x {self.neurons}"
        return (
            f"An MLP of {size} with {self.sparsity:.0%} of its neurons silent: {self.dense_ms:.2f} -> "
            f"{self.sparse_ms:.2f} ms, {self.ratio:.2f}x "
            f"(one token, random weights, {self.dtype}, {self.device}, backend {self.backend}, "
            "against dense PyTorch in the same dtype)"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {**asdict(self), "ratio": self.ratio}


def measure_gain(
    sparsity: float, *, hidden: int = HIDDEN, neurons: int = NEURONS, dtype: torch.dtype | None = None
) -> Gain:
    """Time an MLP of random weights that are not in the cache, dense and skipping; a few seconds.

    Args:
        sparsity: share of silent neurons, 0 <= sparsity < 1.
        hidden: D.
        neurons: F.
        dtype: None means bfloat16 where the processor multiplies it, else float32.

    Raises:
        RuntimeError: no backend can run here, or its result is wrong; nothing is timed then.

    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype is None:
        own = torch.cuda.is_bf16_supported(False) if device == "cuda" else has_bfloat16_products()
        dtype = torch.bfloat16 if own else torch.float32
    backend, density = available(device, dtype), 1 - sparsity
    _check(hidden, neurons, dtype, density, device, backend)
    found = measure_shape(
        Problem("gated", hidden, neurons, dtype, device),
        backend=backend,
        tokens=(1,),
        densities=(density,),
        repeats=15,
        save=False,
    )
    threads = torch.get_num_threads()
    return Gain(
        hidden=hidden,
        neurons=neurons,
        sparsity=sparsity,
        dtype=str(dtype).removeprefix("torch."),
        device=torch.cuda.get_device_name() if device == "cuda" else f"{threads} thread{'s' * (threads > 1)}",
        backend=backend,
        dense_ms=found.dense_ms[1],
        sparse_ms=found.sparse_ms[1][density],
    )


def _check(hidden: int, neurons: int, dtype: torch.dtype, density: float, device: str, backend: str) -> None:
    """A wrong result is worth nothing: against float64, skipping may err twice as much as dense does.

    Allowed besides is one rounding of the largest output.
    """

    def rand(rows: int, columns: int) -> Tensor:
        return (torch.randn(rows, columns, device=device) * columns**-0.5).to(dtype)

    x, gate, up = rand(1, hidden) * hidden**0.5, rand(neurons, hidden), rand(neurons, hidden)
    down = rand(hidden, neurons)
    pre = (x @ gate.t()).float().flatten().sort().values
    shift = pre[min(int((1 - density) * neurons), neurons - 1)].item() if density < 1 else pre[0].item() - 1
    kind: dict[str, Any] = {"activation": "shifted_relu", "threshold": shift}
    with torch.no_grad():
        dense = reference.gated_mlp(x, gate, up, down, **kind)
        exact = reference.gated_mlp(x.double(), gate.double(), up.double(), down.double(), **kind)
        with triton_ops.backend(backend):
            skipping = triton_ops.gated_mlp(x, gate, up, triton_ops.neuron_major_(down), **kind)
    error, allowed = ((y.double() - exact).abs().max().item() for y in (skipping, dense))
    rounding = (torch.finfo(dtype).eps + 4 * torch.finfo(torch.float32).eps) * exact.abs().max().item()
    if not error <= 2 * allowed + rounding:
        raise RuntimeError(
            f"backend {backend!r} computes a wrong MLP on this machine (error {error:.3g}, dense "
            f"{allowed:.3g}); please report it."
        )
