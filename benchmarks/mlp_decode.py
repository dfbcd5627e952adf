"""Decode of one token through an MLP: skipping against dense PyTorch in the same dtype.

    python benchmarks/mlp_decode.py --plot
    python benchmarks/mlp_decode.py --shapes llama-3.2-1b --dtypes bfloat16 --sparsity 90
    python benchmarks/mlp_decode.py --backends cpp torch --threads 1

Dense is what a stock model runs: ``F.linear`` on weights as ``nn.Linear`` stores them. Sparse is the public
operator, Python overhead included; on a GPU both run in a CUDA graph. Calls cycle through as many layers as
it takes to exceed the cache, and results of the first are checked against float64 before anything is timed.

A gated MLP must read its gate and, with a share p of active neurons, p of up and down: the byte limit is
3 / (1 + 2p), that of a plain MLP 2 / (1 + p). A ratio above it means that dense is off its own limit.
"reached" is the ratio over the byte limit; "of bandwidth" is what skipping must read, over its time, against
a streaming read of a large buffer that takes turns with it.
"""

from __future__ import annotations

import argparse
from typing import Any

import blocks
from blocks import Competitor, Layer
from plots import Plot

SPARSITY = (0, 50, 70, 80, 85, 90, 95, 99)
PLOT = Plot(
    "sparsity", "silent neurons, %", lambda row: row["backend"], "One token: skipping against dense", 100
)


def measure(layers: list[Layer], args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per sparsity and backend."""
    rows = []
    inputs = [layer.x for layer in layers]
    for sparsity in args.sparsity:
        shifts = [layer.shift(layer.x, sparsity / 100) for layer in layers]
        active = [
            layer.active(layer.x, shift).float().mean().item()
            for layer, shift in zip(layers, shifts, strict=True)
        ]
        density = sum(active) / len(active)
        competitors = [
            Competitor(
                {"sparsity": round(1 - density, 4), "backend": backend},
                lambda layer, x, shift, backend=backend: layer.sparse(x, shift, backend),
                layers[0].share_read(density),
            )
            for backend in args.backends
        ]
        rows += blocks.compare(layers, inputs, shifts, competitors, args)
    return rows


def cells(row: dict[str, Any]) -> dict[str, str]:
    return {"sparsity": f"{row['sparsity']:.1%}"} | blocks.cells(row)


def main() -> None:
    args = blocks.parser(__doc__, SPARSITY, repeats=15).parse_args()
    blocks.sweep(args, measure, cells, PLOT)


if __name__ == "__main__":
    main()
