"""Decode of one token with certified skip: past the limit that a gate read in full sets, with the same bits.

    python benchmarks/mlp_certified.py --plot
    python benchmarks/mlp_certified.py --shapes llama-2-7b --dtypes bfloat16 --sparsity 90 95
    python benchmarks/mlp_certified.py --weights FOLDER_OR_HUB_ID --text README.md --dtypes bfloat16

Dense, skipping and certified skipping take turns in one run; certified must equal uncertified bit for bit, or
there is no number. A certificate is one byte per weight of the deciding projection (the gate, or the up
projection of a plain MLP); the rows that it does not prove silent survive and are read in full precision.
Their share is recomputed here in float64 from the certificate. With p active and c surviving, the byte limit
of a gated MLP is 3 / (1/b + c + 2p) at b bytes per weight, that of a plain one 2 / (1/b + c + p); without a
certificate see ``mlp_decode.py``. The twelve bytes per row of the bounds are left out.

Weights are Gaussian, or with ``--weights`` those of a causal language model of transformers, with the inputs
that its layers see at the last token of a text. A threshold per layer silences the wanted share.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import blocks
import torch
from blocks import Competitor, Layer
from harness import check_equal
from plots import Plot
from torch import Tensor, nn

import triton_ops

CHUNK = 1024  # rows of a certificate that are in float64 at once
PLOT = Plot(
    "sparsity",
    "silent neurons, %",
    lambda row: f"{row['backend']}, certified" if row["certified"] else row["backend"],
    "One token: certified skipping against dense",
    100,
)


def upper_bounds(certificate: triton_ops.Certificate, x: Tensor, bias: Tensor | None) -> Tensor:
    """What no pre-activation of ``x [1, D]`` exceeds but for rounding, in float64: s (q x) + r ‖x‖ + bias."""
    x = x[0].double()
    dots = torch.cat([rows.double() @ x for rows in certificate.rows.split(CHUNK)])
    scale, residual, _ = certificate.bounds.double().unbind(1)
    return scale * dots + residual * x.norm() + (0 if bias is None else bias.double())


def measure(layers: list[Layer], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Two rows per sparsity and backend: uncertified and certified."""
    certificates = {layer: triton_ops.certify(layer.deciding) for layer in layers}
    bounds = [upper_bounds(certificates[layer], layer.x, layer.biases[0]) for layer in layers]
    inputs = [layer.x for layer in layers]
    rows = []
    for sparsity in args.sparsity:
        shifts = [layer.shift(layer.x, sparsity / 100) for layer in layers]
        cases = list(zip(layers, inputs, shifts, strict=True))
        density = sum(a.active(x, s).float().mean().item() for a, x, s in cases) / len(cases)
        survivors = [(b > s).float().mean().item() for b, s in zip(bounds, shifts, strict=True)]
        surviving = sum(survivors) / len(survivors)
        competitors = []
        for backend in args.backends:

            def plain(layer: Layer, x: Tensor, shift: float, backend: str = backend) -> Tensor:
                return layer.sparse(x, shift, backend)

            def certified(layer: Layer, x: Tensor, shift: float, backend: str = backend) -> Tensor:
                return layer.sparse(x, shift, backend, certificate=certificates[layer])

            for case in cases:
                check_equal(certified(*case), plain(*case), f"{backend}, certified, {sparsity} %")
            fields = {"sparsity": round(1 - density, 4), "backend": backend}
            deciding = 1 / layers[0].deciding.element_size() + surviving
            competitors += [
                Competitor(
                    fields | {"certified": False, "surviving": 1.0}, plain, layers[0].share_read(density)
                ),
                Competitor(
                    fields | {"certified": True, "surviving": round(surviving, 4)},
                    certified,
                    layers[0].share_read(density, deciding),
                ),
            ]
        rows += blocks.compare(layers, inputs, shifts, competitors, args)
    return rows


def cells(row: dict[str, Any]) -> dict[str, str]:
    own = {
        "sparsity": f"{row['sparsity']:.1%}",
        "certified": "yes" if row["certified"] else "no",
        "gate rows": f"{row['surviving']:.1%}",
    }
    return own | blocks.cells(row)


def model_layers(args: argparse.Namespace) -> Iterator[blocks.Group]:
    """For every dtype, the MLPs of a pretrained model with their inputs at the last token of the text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hf_sparse.adapters import find_blocks

    tokenizer = AutoTokenizer.from_pretrained(args.weights)
    text = args.text.read_text() if args.text else __doc__
    tokens = tokenizer(text, return_tensors="pt", truncation=True, max_length=args.text_tokens).input_ids
    seen: dict[str, Tensor] = {}
    for dtype in (getattr(torch, name) for name in args.dtypes):
        model = AutoModelForCausalLM.from_pretrained(args.weights, dtype=dtype).eval().to(args.device)
        found, skipped = find_blocks(model)
        if not found:
            raise SystemExit(f"no MLP of {args.weights} is known: {', '.join(map(str, skipped))}")
        for block in found:

            def keep(x: Tensor, _: Tensor | None, name: str = block.name) -> None:
                seen[name] = x[..., -1:, :]

            block.watch("x", keep)
        model(tokens.to(args.device), use_cache=False)
        layers = [_layer(block, seen[block.name]) for block in found[: args.layers]]
        yield Path(args.weights).name, dtype, layers
        layers.clear()


def _layer(block: Any, x: Tensor) -> Layer:
    linears = [block.module.get_submodule(name) for name in (*block.roles.before_down, block.roles.down)]
    if not all(type(linear) is nn.Linear for linear in linears):
        raise SystemExit(f"{block.name} is not made of nn.Linear")
    *gate, up, down = (weight.detach() for weight, _ in block.weights())
    biases = [bias for _, bias in block.weights()]
    return Layer(x.reshape(1, -1).contiguous(), gate[0] if gate else None, up, down, biases)


def main() -> None:
    parser = blocks.parser(__doc__, (80, 90, 95, 99), repeats=15)
    parser.add_argument("--weights", metavar="FOLDER_OR_HUB_ID", help="of a model instead of --shapes")
    parser.add_argument("--text", type=Path, help="what the model reads; default: this description")
    parser.add_argument("--text-tokens", type=int, default=128, help="at most; default: %(default)s")
    args = parser.parse_args()
    blocks.sweep(args, measure, cells, PLOT, model_layers if args.weights else blocks.random_layers)


if __name__ == "__main__":
    main()
