"""Decode of one token through a gated MLP: skipping against dense PyTorch in the same dtype.

    python benchmarks/mlp_decode.py
    python benchmarks/mlp_decode.py --shapes llama-3.2-1b --dtypes bfloat16 --sparsity 90

Dense is what a stock model runs: three ``F.linear`` on weights as ``nn.Linear`` stores them. Sparse is the
public operator, Python overhead included. Calls cycle through as many layers as it takes to exceed the cache,
and every result is checked against float64 before it is timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from harness import check, interleaved, provenance, save, table
from torch import Tensor

import triton_ops
from triton_ops import reference

SHAPES = {"llama-3.2-1b": (2048, 8192), "llama-2-7b": (4096, 11008)}
SPARSITY = (0, 50, 70, 80, 85, 90, 95, 99)
ACTIVATION = "shifted_relu"  # any share of active neurons can be had through its shift


class Layer:
    """Random weights of one layer, in both layouts of the down projection."""

    def __init__(self, hidden: int, neurons: int, dtype: torch.dtype) -> None:
        def rand(rows: int, columns: int) -> Tensor:
            return (torch.randn(rows, columns) * columns**-0.5).to(dtype)

        self.gate, self.up, self.down = rand(neurons, hidden), rand(neurons, hidden), rand(hidden, neurons)
        self.down_rows = triton_ops.neuron_major_(self.down.clone())

    def shift(self, x: Tensor, sparsity: int) -> float:
        p = (x @ self.gate.t()).float().flatten().sort().values
        return p[int(sparsity / 100 * p.numel())].item() - 1e-6 if sparsity else p[0].item() - 1

    def dense(self, x: Tensor, shift: float) -> Tensor:
        return reference.gated_mlp(x, self.gate, self.up, self.down, activation=ACTIVATION, threshold=shift)

    def exact(self, x: Tensor, shift: float) -> Tensor:
        weights = (w.double() for w in (x, self.gate, self.up, self.down))
        return reference.gated_mlp(*weights, activation=ACTIVATION, threshold=shift)

    def sparse(self, x: Tensor, shift: float, backend: str) -> Tensor:
        with triton_ops.backend(backend):
            return triton_ops.gated_mlp(
                x, self.gate, self.up, self.down_rows, activation=ACTIVATION, threshold=shift
            )

    def density(self, x: Tensor, shift: float) -> float:
        return (reference.activation(x @ self.gate.t(), ACTIVATION, shift) != 0).float().mean().item()


def measure(
    shape: str,
    dtype: torch.dtype,
    sparsity: int,
    backends: list[str],
    args: argparse.Namespace,
    layers: list[Layer],
) -> list[dict[str, object]]:
    """One row per backend: time, ratio to dense, bytes read and share of the byte limit."""
    hidden, neurons = SHAPES[shape]
    x = torch.randn(args.tokens, hidden).to(dtype)
    shifts = [layer.shift(x, sparsity) for layer in layers]
    first, shift = layers[0], shifts[0]
    expected, exact = first.dense(x, shift), first.exact(x, shift)
    for backend in backends:
        check(first.sparse(x, shift, backend), expected, exact, f"{shape} {dtype} {sparsity} % {backend}")

    def calls(backend: str) -> list[Callable[[], Tensor]]:
        if backend == "stock":
            return [lambda a=a, s=s: a.dense(x, s) for a, s in zip(layers, shifts, strict=True)]
        return [lambda a=a, s=s: a.sparse(x, s, backend) for a, s in zip(layers, shifts, strict=True)]

    times, speedups = interleaved({name: calls(name) for name in ["stock", *backends]}, args.repeats)
    density = sum(a.density(x, s) for a, s in zip(layers, shifts, strict=True)) / len(layers)
    matrix = hidden * neurons * dtype.itemsize
    return [
        {
            "shape": shape,
            "hidden": hidden,
            "neurons": neurons,
            "dtype": str(dtype).removeprefix("torch."),
            "tokens": args.tokens,
            "layers_cycled": len(layers),
            "sparsity": round(1 - density, 4),
            "backend": backend,
            "dense": times["stock"],
            "sparse": times[backend],
            "speedup": round(speedups[backend], 3),
            # The gate is read in full, up and down for active neurons.
            "byte_limit": round(3 / (1 + 2 * density), 3),
            "dense_gb_per_s": round(3 * matrix / times["stock"].median_ms / 1e6, 2),
            "sparse_gb_per_s": round(matrix * (1 + 2 * density) / times[backend].median_ms / 1e6, 2),
        }
        for backend in backends
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument(
        "--dtypes", nargs="+", choices=["bfloat16", "float32"], default=["bfloat16", "float32"]
    )
    parser.add_argument(
        "--sparsity", nargs="+", type=int, default=list(SPARSITY), help="percent of silent neurons"
    )
    parser.add_argument("--backends", nargs="+", choices=triton_ops.BACKENDS, default=["auto"])
    parser.add_argument("--tokens", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--cold_mib", type=int, default=512, help="weights that calls cycle through")
    parser.add_argument("--threads", type=int, help="default: all cores")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/mlp_decode.json")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    conditions = provenance()
    print(", ".join(f"{k} {v}" for k, v in conditions.items() if v is not None), flush=True)
    results: list[dict[str, object]] = []
    with torch.inference_mode():
        for shape in args.shapes:
            for dtype in (getattr(torch, name) for name in args.dtypes):
                hidden, neurons = SHAPES[shape]
                count = max(4, -(-(args.cold_mib << 20) // (3 * hidden * neurons * dtype.itemsize)))
                layers = [Layer(hidden, neurons, dtype) for _ in range(count)]
                rows = []
                for sparsity in args.sparsity:
                    rows += measure(shape, dtype, sparsity, args.backends, args, layers)
                results += rows
                print(f"\n{shape} ({hidden} x {neurons}), {rows[0]['dtype']}, {count} layers")
                print(_table(rows), flush=True)
                del layers
    print("\nwritten to", save("mlp_decode", conditions, results, args.out))


def _table(rows: list[dict[str, object]]) -> str:
    head = ["sparsity", "backend", "dense ms", "sparse ms", "quartiles", "speedup", "byte limit", "GB/s"]
    body = [
        [
            f"{row['sparsity']:.1%}",
            str(row["backend"]),
            f"{row['dense'].median_ms:.2f}",
            f"{row['sparse'].median_ms:.2f}",
            f"{row['sparse'].low_ms:.2f}-{row['sparse'].high_ms:.2f}",
            f"{row['speedup']:.2f}x",
            f"{row['byte_limit']:.2f}x",
            f"{row['sparse_gb_per_s']:.1f}",
        ]
        for row in rows
    ]
    return table([head, *body])


if __name__ == "__main__":
    main()
