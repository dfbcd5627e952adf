"""The dense product of a few tokens with the weight of a linear layer: ``triton_ops.linear`` against torch.

    python benchmarks/linear.py
    python benchmarks/linear.py --shapes 2048x2048 --tokens 1 --dtypes bfloat16 float16
    python benchmarks/linear.py --layouts columns --threads 1

A shape is outputs x inputs: projections of SmolLM2-135M and of Llama-3.2-1B, one as large as a head, and the
head of the former. Torch is ``F.linear`` on the same weight. Both go through the public function, Python
included, and cycle through as many weights as it takes to exceed the cache; the results are checked against
float64 before anything is timed. Every weight must be read once: "GB/s" is its bytes over the time, "of
bandwidth" that against a streaming read of a large buffer that takes turns with both.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import harness
import torch
import torch.nn.functional as F
from blocks import DTYPES
from torch import Tensor

import triton_ops

DIFFERENT = 4  # weights with values of their own; the others are copies, which are quicker to make


class Shape(NamedTuple):
    """Of a weight, as ``nn.Linear`` has it."""

    outputs: int
    inputs: int

    @classmethod
    def of(cls, text: str) -> Shape:
        if not (match := re.fullmatch(r"(\d+)x(\d+)", text)):
            raise argparse.ArgumentTypeError(f"{text!r} is not like 2048x2048, outputs by inputs")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.outputs}x{self.inputs}"


SHAPES = [
    Shape(576, 576),
    Shape(1536, 576),
    Shape(2048, 2048),
    Shape(8192, 2048),
    Shape(32768, 2048),
    Shape(49152, 576),
]


def weights(shape: Shape, dtype: torch.dtype, layout: str, args: argparse.Namespace) -> list[Tensor]:
    """At least two, and more than a cache holds."""
    size = shape.outputs * shape.inputs * dtype.itemsize
    count = max(2, -(-((args.cold_mib or 512) << 20) // size))
    found = [torch.randn(*shape, device=args.device).mul_(shape.inputs**-0.5).to(dtype) for _ in range(2)]
    while len(found) < count:
        fresh = len(found) < DIFFERENT
        found.append(torch.randn_like(found[0]) * shape.inputs**-0.5 if fresh else found[0].clone())
    return [triton_ops.neuron_major_(w) for w in found] if layout == "columns" else found


def cases(args: argparse.Namespace) -> Iterator[tuple[dict[str, Any], list[Tensor]]]:
    """What is measured, by weights: one case's are gone before the next are made."""
    for shape in args.shapes:
        for name in args.dtypes:
            for layout in args.layouts:
                found = weights(shape, getattr(torch, name), layout, args)
                about = {
                    "shape": str(shape),
                    "outputs": shape.outputs,
                    "inputs": shape.inputs,
                    "dtype": name,
                    "layout": layout,
                    "weights_cycled": len(found),
                    "cycled_mib": round(sum(w.nbytes for w in found) / 2**20),
                }
                yield about, found
                found.clear()


def compare(found: list[Tensor], tokens: int, args: argparse.Namespace) -> dict[str, Any]:
    """One row: both times, their ratio, and the speed at which weights were read."""
    inputs = [torch.randn(tokens, w.shape[1], device=w.device).to(w.dtype) for w in found]

    def run(call: Callable[[Tensor, Tensor], Tensor]) -> harness.Run:
        pairs = zip(inputs, found, strict=True)
        return harness.Run([lambda x=x, w=w: call(x, w) for x, w in pairs], args.device)

    runs = {
        "torch": run(F.linear),
        "linear": run(lambda x, w: triton_ops.linear(x, w, backend=args.backend)),
    }
    exact = F.linear(inputs[0].double(), found[0].double())
    expected, actual = (runs[name].outputs()[0] for name in runs)
    harness.check(actual, expected, exact, args.backend)
    times, ratios = harness.interleaved(runs | {"read": args.read.run}, args.repeats)
    speeds = {name: found[0].nbytes / times[name].median_ms / 1e6 for name in runs}
    limit = args.read.speed(times["read"])
    return {
        "tokens": tokens,
        "backend": args.backend,
        "torch": times["torch"],
        "linear": times["linear"],
        "speedup": round(ratios["linear"].median, 3),
        "speedup_quartiles": [round(ratios["linear"].low, 3), round(ratios["linear"].high, 3)],
        "torch_gb_per_s": round(speeds["torch"], 1),
        "gb_per_s": round(speeds["linear"], 1),
        "read_gb_per_s": limit,
        "bandwidth_share": round(speeds["linear"] / limit, 3),
    }


def cells(row: dict[str, Any]) -> dict[str, str]:
    return {
        "tokens": str(row["tokens"]),
        "torch ms": f"{row['torch'].median_ms:.3f}",
        "linear ms": f"{row['linear'].median_ms:.3f}",
        "quartiles": f"{row['linear'].low_ms:.3f}-{row['linear'].high_ms:.3f}",
        "speedup": f"{row['speedup']:.2f}x",
        "its quartiles": "{:.2f}-{:.2f}".format(*row["speedup_quartiles"]),
        "torch GB/s": f"{row['torch_gb_per_s']:.1f}",
        "GB/s": f"{row['gb_per_s']:.1f}",
        "of bandwidth": f"{row['bandwidth_share']:.0%}",
    }


def main() -> None:
    parser = harness.parser(__doc__, repeats=15)
    parser.add_argument(
        "--shapes", nargs="+", type=Shape.of, default=SHAPES, metavar="OUTPUTSxINPUTS", help="of weights"
    )
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bfloat16", "float32"])
    parser.add_argument("--layouts", nargs="+", choices=["rows", "columns"], default=["rows"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--backend", choices=triton_ops.BACKENDS, default="cpp", help="default: %(default)s")
    parser.add_argument("--cold-mib", type=int, help="weights that calls cycle through; default: 512")
    args = parser.parse_args()
    conditions = harness.begin_reading(args)
    results: list[dict[str, Any]] = []
    with torch.inference_mode():
        for about, found in cases(args):
            rows = [about | compare(found, tokens, args) for tokens in args.tokens]
            results += rows
            print(
                f"\n{about['shape']}, {about['dtype']}, {about['layout']}, cycling through "
                f"{about['weights_cycled']} weights of {about['cycled_mib']} MiB"
            )
            print(harness.table([cells(row) for row in rows]), flush=True)
            harness.save(args.out, conditions, results)
    print("\nwritten to", args.out)


if __name__ == "__main__":
    main()
