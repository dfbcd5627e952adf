"""An MLP with 1 to 512 tokens in a call, every one with silent neurons of its own: skipping against dense.

    python benchmarks/mlp_batch.py --plot
    python benchmarks/mlp_batch.py --shapes llama-2-7b --dtypes bfloat16 --tokens 1 4 --union
    python benchmarks/mlp_batch.py --union 8:30 8:45

A weight row is needed if any of the tokens needs it, so what counts is the union of their active neurons,
which is measured and reported; the byte limit, as in ``mlp_decode.py``, is that of the union. Two kinds:

independent   random inputs; at 90 % the union of 8 tokens is 57 % of the neurons
correlated    inputs that share a part, as tokens of trained models do. ``--union 8:30`` finds by bisection
              the correlation at which the union of 8 tokens is 30 %, and takes it for any number of tokens.

The threshold silences the wanted share of neurons on average over the tokens of a call. A ratio far above the
limit says that dense is slow, as torch's float16 products of several tokens are on many CPUs: compare times.
"""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

import blocks
import torch
from blocks import Competitor, Layer
from plots import Plot
from torch import Tensor

STEPS = 12  # of the bisection
PLOT = Plot(
    "tokens",
    "tokens in a call",
    lambda row: f"{row['inputs']}, {row['backend']}",
    "Several tokens: skipping against dense",
    log=True,
)


class Target(NamedTuple):
    """The union that correlated tokens shall have."""

    tokens: int
    union: float

    @classmethod
    def of(cls, text: str) -> Target:
        """From ``8:30``, in percent."""
        tokens, percent = text.split(":")
        return cls(int(tokens), float(percent) / 100)


def draw(tokens: int, rho: float, like: Tensor) -> Tensor:
    """Gaussian inputs ``[T, D]`` of which any two have correlation ``rho``."""
    common, own = (torch.randn(n, like.shape[1], device=like.device) for n in (1, tokens))
    return (rho**0.5 * common + (1 - rho) ** 0.5 * own).to(like.dtype)


def union_share(layer: Layer, x: Tensor, shift: float) -> float:
    """The share of neurons that are active for any token of ``x [T, D]``."""
    return layer.active(x, shift).any(0).float().mean().item()


def correlation(layer: Layer, target: Target, sparsity: float) -> float:
    """The ``rho`` of :func:`draw` at which the union is as wanted.

    Raises:
        SystemExit: no such tokens exist.

    """

    def union(rho: float) -> float:
        x = draw(target.tokens, rho, layer.x)
        return union_share(layer, x, layer.shift(x, sparsity))

    most, least = union(0.0), 1 - sparsity
    if not least <= target.union <= most:
        raise SystemExit(
            f"--union {target.tokens}:{target.union * 100:g} is impossible at {sparsity:.0%} sparsity: "
            f"{target.tokens} equal tokens have a union of {least:.0%}, independent ones of {most:.0%}"
        )
    low, high = 0.0, 1.0
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if union(middle) > target.union else (low, middle)
    return (low + high) / 2


def measure(layers: list[Layer], args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per sparsity, kind of tokens, number of tokens and backend."""
    rows = []
    for sparsity in (s / 100 for s in args.sparsity):
        kinds = {"independent": 0.0} | {
            f"correlated {target.tokens}:{target.union * 100:g}": correlation(layers[0], target, sparsity)
            for target in args.union
        }
        for kind, rho in kinds.items():
            for tokens in args.tokens:
                inputs = [draw(tokens, rho, layer.x) for layer in layers]
                shifts = [layer.shift(x, sparsity) for layer, x in zip(layers, inputs, strict=True)]
                cases = list(zip(layers, inputs, shifts, strict=True))
                union = sum(union_share(*case) for case in cases) / len(cases)
                density = sum(a.active(x, s).float().mean().item() for a, x, s in cases) / len(cases)
                competitors = [
                    Competitor(
                        {
                            "inputs": kind,
                            "correlation": round(rho, 4),
                            "sparsity": round(1 - density, 4),
                            "union": round(union, 4),
                            "backend": backend,
                        },
                        lambda layer, x, shift, backend=backend: layer.sparse(x, shift, backend),
                        layers[0].share_read(union),
                    )
                    for backend in args.backends
                ]
                rows += blocks.compare(layers, inputs, shifts, competitors, args)
    return rows


def cells(row: dict[str, Any]) -> dict[str, str]:
    own = {
        "inputs": row["inputs"],
        "tokens": str(row["tokens"]),
        "sparsity": f"{row['sparsity']:.1%}",
        "union": f"{row['union']:.1%}",
    }
    return own | blocks.cells(row)


def main() -> None:
    parser = blocks.parser(__doc__, (90,), repeats=9)
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32, 128, 512])
    parser.add_argument(
        "--union",
        nargs="*",
        type=Target.of,
        default=[Target(8, 0.3)],
        metavar="TOKENS:PERCENT",
        help="of correlated tokens; default: 8:30; nothing: only independent ones",
    )
    blocks.sweep(parser.parse_args(), measure, cells, PLOT)


if __name__ == "__main__":
    main()
