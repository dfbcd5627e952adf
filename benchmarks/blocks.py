"""What the MLP benchmarks share: shapes, layers, competitors against dense, the sweep over them."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import harness
import plots
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import triton_ops
from triton_ops import reference
from triton_ops.activations import TABLE

ACTIVATION = "shifted_relu"  # any share of active neurons can be had through its shift
DTYPES = ("bfloat16", "float16", "float32")


class Shape(NamedTuple):
    """Of an MLP; a plain one has no gate."""

    name: str
    hidden: int
    neurons: int
    gated: bool

    @classmethod
    def of(cls, text: str) -> Shape:
        """A known name, or ``64x96``, or ``64x96-plain``."""
        if text in SHAPES:
            return SHAPES[text]
        if not (match := re.fullmatch(r"(\d+)x(\d+)(-plain)?", text)):
            raise argparse.ArgumentTypeError(
                f"{text!r} is none of {', '.join(SHAPES)}, nor like 64x96 or 64x96-plain"
            )
        return cls(text, int(match[1]), int(match[2]), not match[3])


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("llama-3.2-1b", 2048, 8192, True),
        Shape("llama-2-7b", 4096, 11008, True),
        Shape("llama-3-8b", 4096, 14336, True),
        Shape("opt-6.7b", 4096, 16384, False),
    )
}


def llama(shape: Shape, layers: int, dtype: torch.dtype, device: str) -> Any:
    """Gated MLPs of this shape in a Llama with next to no attention; random weights."""
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.neurons,
        num_hidden_layers=layers,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
        vocab_size=8,
    )
    model: Any = LlamaForCausalLM(config).to(dtype).to(device)
    for weight in model.parameters():
        if weight.dim() == 2:
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
    return model


class Layer:
    """The weights of one layer, in both layouts of the down projection, and an input of one token."""

    def __init__(
        self, x: Tensor, gate: Tensor | None, up: Tensor, down: Tensor, biases: Sequence[Tensor | None]
    ) -> None:
        self.x, self.down = x, down
        self.first = (up,) if gate is None else (gate, up)
        self.biases = biases
        self.down_rows = triton_ops.neuron_major_(down.clone())
        self.deciding = self.first[0]

    @classmethod
    def random(cls, shape: Shape, dtype: torch.dtype, device: str) -> Layer:
        """Gaussian weights, none of them biases."""

        def rand(rows: int, columns: int, fan_in: int) -> Tensor:
            return (torch.randn(rows, columns, device=device) * fan_in**-0.5).to(dtype)

        gate = rand(shape.neurons, shape.hidden, shape.hidden) if shape.gated else None
        up = rand(shape.neurons, shape.hidden, shape.hidden)
        down = rand(shape.hidden, shape.neurons, shape.neurons)
        return cls(rand(1, shape.hidden, 1), gate, up, down, [None] * (3 if shape.gated else 2))

    def pre(self, x: Tensor) -> Tensor:
        """The pre-activations that decide which neurons are active, ``[T, F]``."""
        return F.linear(x, self.deciding, self.biases[0])

    def shift(self, x: Tensor, sparsity: float) -> float:
        """The threshold that silences this share of the neurons, on average over tokens ``x [T, D]``."""
        return quantile(self.pre(x), sparsity)

    def active(self, x: Tensor, shift: float) -> Tensor:
        """Which neurons of which token are, ``[T, F]``."""
        return TABLE[ACTIVATION].value(self.pre(x), shift) != 0

    def dense(self, x: Tensor, shift: float) -> Tensor:
        """What a stock model runs: ``F.linear`` on weights as ``nn.Linear`` stores them."""
        return self._call(reference, (x, *self.first, self.down, *self.biases), shift)

    def exact(self, x: Tensor, shift: float) -> Tensor:
        """In float64."""
        tensors = (x, *self.first, self.down, *self.biases)
        return self._call(reference, [None if t is None else t.double() for t in tensors], shift)

    def sparse(self, x: Tensor, shift: float, backend: str, **options: Any) -> Tensor:
        """The public operator."""
        with triton_ops.backend(backend):
            return self._call(triton_ops, (x, *self.first, self.down_rows, *self.biases), shift, **options)

    def _call(self, module: Any, tensors: Sequence[Tensor | None], shift: float, **options: Any) -> Tensor:
        operator = module.gated_mlp if len(self.first) == 2 else module.plain_mlp
        return operator(*tensors, activation=ACTIVATION, threshold=shift, **options)

    def share_read(self, density: float, deciding: float = 1.0) -> float:
        """Of the dense bytes, those to be read: ``deciding`` of its matrix, ``density`` of the others."""
        return (deciding + len(self.first) * density) / (len(self.first) + 1)

    @property
    def bytes(self) -> int:
        """Of the weights."""
        return (len(self.first) + 1) * self.down.numel() * self.down.element_size()


def quantile(values: Tensor, share: float) -> float:
    """The smallest value with at least this share of all at or below it; below all values for share 0."""
    ordered = values.float().flatten()
    if share == 0:
        return ordered.min().item() - 1
    return ordered.kthvalue(min(max(round(share * ordered.numel()), 1), ordered.numel())).values.item()


@dataclass(frozen=True)
class Competitor:
    """Against dense: what it is called in the result, how it runs a layer, and what it must read."""

    fields: dict[str, Any]
    """Of its row in the result."""
    call: Callable[[Layer, Tensor, float], Tensor]
    """Of layer, input and threshold."""
    share_read: float
    """Of the dense bytes."""


def compare(
    layers: Sequence[Layer],
    inputs: Sequence[Tensor],
    shifts: Sequence[float],
    competitors: Sequence[Competitor],
    args: argparse.Namespace,
) -> list[dict[str, Any]]:
    """One row per competitor, its result checked first: time, ratio to dense, bytes, both limits."""

    def run(call: Callable[[Layer, Tensor, float], Tensor]) -> harness.Run:
        cases = zip(layers, inputs, shifts, strict=True)
        return harness.Run([lambda c=case: call(*c) for case in cases], args.device)

    runs = {"dense": run(Layer.dense)} | {str(c.fields): run(c.call) for c in competitors}
    expected, exact = runs["dense"].outputs()[0], layers[0].exact(inputs[0], shifts[0])
    for name in list(runs)[1:]:
        harness.check(runs[name].outputs()[0], expected, exact, name)
    times, ratios = harness.interleaved(runs | {"read": args.read.run}, args.repeats)
    limit = args.read.speed(times["read"])
    rows = []
    for competitor in competitors:
        timing, ratio = times[str(competitor.fields)], ratios[str(competitor.fields)]
        read = layers[0].bytes * competitor.share_read
        speed = read / timing.median_ms / 1e6
        rows.append(
            {
                "tokens": len(inputs[0]),
                **competitor.fields,
                "dense": times["dense"],
                "sparse": timing,
                "speedup": round(ratio.median, 3),
                "speedup_quartiles": [round(ratio.low, 3), round(ratio.high, 3)],
                "byte_limit": round(1 / competitor.share_read, 3),
                "limit_share": round(ratio.median * competitor.share_read, 3),
                "mb_read": round(read / 1e6, 2),
                "gb_per_s": round(speed, 1),
                "dense_gb_per_s": round(layers[0].bytes / times["dense"].median_ms / 1e6, 1),
                "read_gb_per_s": limit,
                "bandwidth_share": round(speed / limit, 3),
            }
        )
    return rows


def cells(row: dict[str, Any]) -> dict[str, str]:
    """The columns that the tables of all MLP benchmarks end with."""
    return {
        "backend": row["backend"],
        "dense ms": f"{row['dense'].median_ms:.3f}",
        "sparse ms": f"{row['sparse'].median_ms:.3f}",
        "quartiles": f"{row['sparse'].low_ms:.3f}-{row['sparse'].high_ms:.3f}",
        "speedup": f"{row['speedup']:.2f}x",
        "byte limit": f"{row['byte_limit']:.2f}x",
        "reached": f"{row['limit_share']:.0%}",
        "GB/s": f"{row['gb_per_s']:.1f}",
        "of bandwidth": f"{row['bandwidth_share']:.0%}",
    }


def parser(doc: str | None, sparsity: Sequence[float], repeats: int) -> argparse.ArgumentParser:
    """The options that the MLP benchmarks have."""
    found = harness.parser(doc, repeats)
    found.add_argument(
        "--shapes",
        nargs="+",
        type=Shape.of,
        default=list(SHAPES.values()),
        metavar="SHAPE",
        help=f"of {', '.join(SHAPES)}, or like 64x96 or 64x96-plain; default: those with a name",
    )
    found.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    found.add_argument(
        "--sparsity", nargs="+", type=float, default=sparsity, help="percent of silent neurons"
    )
    found.add_argument(
        "--backends", nargs="+", choices=triton_ops.BACKENDS, help="default: cpp on cpu, triton on cuda"
    )
    found.add_argument(
        "--cold-mib",
        type=int,
        help="dense weights that calls cycle through; default: 512 on cpu, 1024 on cuda",
    )
    found.add_argument("--layers", type=int, help="instead of as many as --cold-mib takes")
    found.add_argument("--plot", action="store_true", help="a PNG beside the JSON; needs matplotlib")
    return found


Group = tuple[str, torch.dtype, list[Layer]]


def random_layers(args: argparse.Namespace) -> Iterator[Group]:
    """For every shape and dtype, at least four layers and more weights than a cache holds."""
    for shape in args.shapes:
        for dtype in (getattr(torch, name) for name in args.dtypes):
            layers = [Layer.random(shape, dtype, args.device)]
            cold_mib = args.cold_mib or (1024 if args.device == "cuda" else 512)
            count = args.layers or max(4, -(-(cold_mib << 20) // layers[0].bytes))
            layers += [Layer.random(shape, dtype, args.device) for _ in range(count - 1)]
            yield shape.name, dtype, layers
            layers.clear()  # before the next are made, also where the consumer still holds the list


def sweep(
    args: argparse.Namespace,
    measure: Callable[[list[Layer], argparse.Namespace], list[dict[str, Any]]],
    row_cells: Callable[[dict[str, Any]], dict[str, str]],
    plot: plots.Plot,
    groups: Callable[[argparse.Namespace], Iterator[Group]] = random_layers,
) -> None:
    """Measure every group of layers, printing and saving as it goes."""
    args.backends = args.backends or ["triton" if args.device == "cuda" else "cpp"]
    conditions = harness.begin_reading(args)
    results: list[dict[str, Any]] = []
    with torch.inference_mode():
        for name, dtype, layers in groups(args):
            neurons, hidden = layers[0].deciding.shape
            about = {
                "shape": name,
                "hidden": hidden,
                "neurons": neurons,
                "gated": len(layers[0].first) == 2,
                "dtype": str(dtype).removeprefix("torch."),
                "layers_cycled": len(layers),
                "cycled_mib": round(len(layers) * layers[0].bytes / 2**20),
            }
            rows = [about | row for row in measure(layers, args)]
            results += rows
            print(
                f"\n{name} ({hidden} x {neurons}), {about['dtype']}, cycling through {len(layers)} layers "
                f"of {about['cycled_mib']} MiB of dense weights"
            )
            print(harness.table([row_cells(row) for row in rows]), flush=True)
            harness.save(args.out, conditions, results)
    print("\nwritten to", args.out)
    if args.plot:
        print("written to", plots.draw(args.out.with_suffix(".png"), results, plot))
