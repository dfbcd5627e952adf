"""Greedy ``generate()`` of a calibrated SwiGLU model, with no training: skipping against dense, end to end.

    python benchmarks/calibrated.py
    python benchmarks/calibrated.py --methods teal wina scap cats
    python benchmarks/calibrated.py --model DIR      # a folder that transformers can load

Competitors: the stock model; the calibrated one with its weights stored for skipping and nothing skipped,
"dense, same kernels"; and as ``calibrate`` leaves it. By default the shape of Llama-3.2-1B with random
weights, calibrated on random tokens, which sets what share is skipped: what a step costs depends on shapes
and sparsity alone. Before any timing the logits are compared with those of the calibrated model in float32:
skipping must not be clearly further off than dense.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
from typing import Any

import generate
import harness
import torch

import hf_sparse
from hf_sparse.calibration.search import methods
from hf_sparse.inputs import named_thresholded

STOCK, DENSE, SPARSE = "stock", "dense, same kernels", "calibrated"


def nothing_skipped(model: Any) -> Any:
    """A copy of a calibrated model with thresholds that no value is below."""
    own = copy.deepcopy(model)
    if linears := list(named_thresholded(own)):
        for _, linear in linears:
            linear.pruning = dataclasses.replace(linear.pruning, threshold=1e-38)
            linear.density = 1.0
    else:
        activation = hf_sparse.inspect(own).config.activation
        hf_sparse.patch(own, activation.name, threshold=0.0)
    return own


def main() -> None:
    parser = harness.parser(__doc__, repeats=5)
    generate.add_model(parser)
    parser.add_argument("--methods", nargs="+", choices=methods(), default=["teal"])
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--compile", action="store_true", help="the step of all but the stock model")
    args = parser.parse_args()
    args.batch, args.static_cache = 1, False
    conditions = harness.begin(args)
    stock = generate.model_of(args)
    texts = torch.randint(1, stock.config.vocab_size, (4, 64), device=args.device)
    rows: list[dict[str, Any]] = []
    for method in args.methods:
        rows += compare(stock, texts, method, args)
        harness.save(args.out, conditions, rows)
    print("written to", args.out)


def compare(stock: Any, texts: torch.Tensor, method: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each competitor."""
    prompt = texts[:1, : args.prompt_tokens]
    sparse = copy.deepcopy(stock)
    report = hf_sparse.calibrate(sparse, [{"input_ids": texts}], method=method, target_sparsity=args.sparsity)
    reference = copy.deepcopy(stock)
    hf_sparse.patch(reference, report.config)
    found = {DENSE: nothing_skipped(sparse), STOCK: stock, SPARSE: sparse}
    for name in (DENSE, SPARSE):
        hf_sparse.prepare(found[name], compile=args.compile)
    backends = {STOCK: "dense", DENSE: "cpp" if args.device == "cpu" else "triton", SPARSE: "auto"}
    runs = {
        name: harness.Run(
            [generate.generation(model, prompt, backends[name], args)], args.device, graph=False
        )
        for name, model in found.items()
    }
    tokens = {name: run.outputs()[0] for name, run in runs.items()}
    errors = generate.check_logits(
        reference, {SPARSE: sparse}, tokens[SPARSE], args.prompt_tokens, backends[SPARSE]
    )
    del reference
    times, ratios = harness.interleaved(runs, args.repeats)
    rows = [
        {
            **generate.speed(name, timing, ratios[name], args.new_tokens),
            "method": method,
            "sparsity": round(report.sparsity, 4) if name == SPARSE else 0.0,
            "counts": report.counts,
            "of": "random" if args.model is None else args.model.name,
            "hidden": stock.config.hidden_size,
            "neurons": stock.config.intermediate_size,
            "layers": stock.config.num_hidden_layers,
            "dtype": args.dtype,
            "new_tokens": args.new_tokens,
            "compiled": args.compile and name != STOCK,
            "logit_error": errors.get(name),
        }
        for name, timing in times.items()
    ]
    print(f"\n{method}, {report.sparsity:.1%} of {report.counts}")
    print(harness.table([generate.speed_cells(row) for row in rows]), flush=True)
    return rows


if __name__ == "__main__":
    main()
