"""Measures, on this machine, up to which density skipping beats dense, and keeps it for the dispatch.

``python -m triton_ops.tune --hidden 2048 --neurons 8192 --dtype bfloat16`` prints a table and stores the
result; :func:`measure` does the same from Python.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from triton_ops import break_even, dispatch, reference
from triton_ops.layout import neuron_major_
from triton_ops.ops import gated_mlp, sparse_linear

DENSITIES = (1.0, 0.75, 0.5, 0.3, 0.2, 0.1, 0.05)
COLD_BYTES = 128 << 20  # weights that calls cycle through, more than a cache holds


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Times of one block shape on this machine, in milliseconds per call."""

    backend: str
    hidden: int
    neurons: int
    dtype: torch.dtype
    gated: bool
    dense_ms: dict[int, float]
    """By tokens."""
    sparse_ms: dict[int, dict[float, float]]
    """By tokens, then by density of independent tokens."""

    @property
    def density(self) -> tuple[float, ...]:
        """For 1, 2, … tokens, the largest density at which, and below which, skipping was no slower."""
        found = []
        for tokens, dense in self.dense_ms.items():
            best = 0.0
            for density, sparse in sorted(self.sparse_ms[tokens].items()):
                if sparse > dense:
                    break
                best = density
            if best == 0.0:
                break
            found.append(best)
        return tuple(found)

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        lines = [
            f"{self.backend}, {name}, {self.hidden} x {self.neurons}, "
            f"{'gated MLP' if self.gated else 'linear'}; dense / sparse time by density",
            "tokens  dense ms " + "".join(f"{d:>8.0%}" for d in DENSITIES) + "  break-even",
        ]
        for i, (tokens, dense) in enumerate(self.dense_ms.items()):
            ratios = "".join(f"{dense / self.sparse_ms[tokens][d]:>8.2f}" for d in DENSITIES)
            limit = f"{self.density[i]:.0%}" if i < len(self.density) else "dense"
            lines.append(f"{tokens:>6}  {dense:>8.3f} {ratios}  {limit:>10}")
        return "\n".join(lines)


def measure(
    hidden: int,
    neurons: int,
    dtype: torch.dtype,
    *,
    gated: bool = True,
    device: str = "cpu",
    backend: str | None = None,
    max_tokens: int = 4,
    repeats: int = 5,
    save: bool = True,
) -> Measurement:
    """Time dense and skipping at a block's shape with random weights, cycling past the cache.

    Args:
        hidden: D.
        neurons: F.
        dtype: of weights and activations.
        gated: :func:`gated_mlp` or :func:`sparse_linear`.
        device: ``"cpu"`` or ``"cuda"``.
        backend: ``"cpp"``, ``"torch"`` or ``"triton"``; None takes the best that can run.
        max_tokens: measure 1 … this many tokens.
        repeats: times that each point is measured; the median counts.
        save: keep the result in the cache folder, where the dispatch of this and later processes finds it.

    Raises:
        RuntimeError: no backend can run with this dtype on this device.
        OSError: ``save`` and the cache folder cannot be written.

    """
    name = backend or _available(device, dtype)
    bytes_per_block = (3 if gated else 1) * hidden * neurons * dtype.itemsize
    blocks = [
        _block(hidden, neurons, dtype, gated, device)
        for _ in range(min(64, max(1, COLD_BYTES // bytes_per_block)))
    ]
    dense_ms: dict[int, float] = {}
    sparse_ms: dict[int, dict[float, float]] = {}
    with torch.no_grad():
        for tokens in range(1, max_tokens + 1):
            calls: dict[object, list[Callable[[], Tensor]]] = {"dense": []}
            for weights in blocks:
                for density in DENSITIES:
                    dense, sparse = _calls(weights, tokens, density, name)
                    calls.setdefault(density, []).append(sparse)
                calls["dense"].append(dense)
            times = _interleaved(calls, repeats, device)
            dense_ms[tokens] = times["dense"]
            sparse_ms[tokens] = {density: times[density] for density in DENSITIES}
    result = Measurement(
        backend=name,
        hidden=hidden,
        neurons=neurons,
        dtype=dtype,
        gated=gated,
        dense_ms=dense_ms,
        sparse_ms=sparse_ms,
    )
    if save:
        break_even.store(name, device, dtype, hidden, neurons, gated, result.density)
        dispatch.forget()
    return result


def _available(device: str, dtype: torch.dtype) -> str:
    reasons = []
    for name in dispatch.AUTOMATIC.get(device, ()):
        reason = dispatch.path(name).unusable(torch.device(device), dtype)
        if reason is None:
            return name
        reasons.append(f"{name}: {reason}")
    raise RuntimeError(f"nothing to measure for {dtype} on {device}: {'; '.join(reasons) or 'no backend'}.")


def _block(hidden: int, neurons: int, dtype: torch.dtype, gated: bool, device: str) -> tuple[Tensor, ...]:
    """Gate, up, down as a linear stores it, down neuron-major; without gate and up for a linear."""

    def rand(rows: int, columns: int) -> Tensor:
        return (torch.randn(rows, columns, device=device) * columns**-0.5).to(dtype)

    down = rand(hidden, neurons)
    gate_up = (rand(neurons, hidden), rand(neurons, hidden)) if gated else ()
    return (*gate_up, down, neuron_major_(down.clone()))


def _calls(
    weights: tuple[Tensor, ...], tokens: int, density: float, backend: str
) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """The dense and the sparse call of one block with this share of active neurons."""
    *gate_up, down, rows = weights
    if not gate_up:
        h = torch.randn(tokens, down.shape[1], device=down.device)
        h = h.masked_fill(torch.rand_like(h) >= density, 0).to(down.dtype)

        def sparse_h() -> Tensor:
            with dispatch.backend(backend):
                return sparse_linear(h, rows)

        return lambda: reference.sparse_linear(h, down), sparse_h
    gate, up = gate_up
    x = torch.randn(tokens, gate.shape[1], device=gate.device).to(gate.dtype)
    p = (x @ gate.t()).float().flatten().sort().values
    shift = p[min(int((1 - density) * p.numel()), p.numel() - 1)].item() if density < 1 else -1e4

    def sparse() -> Tensor:
        with dispatch.backend(backend):
            return gated_mlp(x, gate, up, rows, activation="shifted_relu", threshold=shift)

    def dense() -> Tensor:
        return reference.gated_mlp(x, gate, up, down, activation="shifted_relu", threshold=shift)

    return dense, sparse


def _interleaved(
    calls: dict[object, list[Callable[[], Tensor]]], repeats: int, device: str
) -> dict[object, float]:
    """Median milliseconds per call, the competitors taking turns so that drift hits all alike."""
    times: dict[object, list[float]] = {key: [] for key in calls}
    for repeat in range(repeats + 1):
        for key, functions in calls.items():
            start = _now(device)
            for function in functions:
                function()
            if repeat:  # the first round warms up
                times[key].append((_now(device) - start) / len(functions) * 1e3)
    return {key: sorted(values)[len(values) // 2] for key, values in times.items()}


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(prog="python -m triton_ops.tune", description=__doc__)
    parser.add_argument("--hidden", type=int, required=True, help="size D of the residual stream")
    parser.add_argument("--neurons", type=int, required=True, help="intermediate size F")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--linear", action="store_true", help="the skip-zero linear instead of the gated MLP")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument(
        "--backend", choices=["cpp", "torch", "triton"], help="default: the best that can run"
    )
    parser.add_argument("--max_tokens", type=int, default=4)
    parser.add_argument("--dry_run", action="store_true", help="print, but do not store the break-even")
    args = parser.parse_args()
    result = measure(
        args.hidden,
        args.neurons,
        getattr(torch, args.dtype),
        gated=not args.linear,
        device=args.device,
        backend=args.backend,
        max_tokens=args.max_tokens,
        save=not args.dry_run,
    )
    print(result)


if __name__ == "__main__":
    main()
