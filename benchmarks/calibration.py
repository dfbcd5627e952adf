"""What calibration costs in quality: perplexity on held-out text, by method and sparsity; nothing is timed.

    python benchmarks/calibration.py --model DIR --dataset TEXT
    python benchmarks/calibration.py --model DIR --dataset TEXT --methods teal-greedy --levels 0.5

Thresholds are chosen on the training split of TEXT, perplexity is that of its validation split, in windows of
--sequence-length. A row that is in the results already is not made again.
"""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import harness
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_sparse
from hf_sparse.texts import evaluation_texts, training_texts

METHODS: dict[str, dict[str, str]] = {
    "teal": {"method": "teal"},
    "teal-greedy": {"method": "teal", "allocation": "greedy"},
    "wina": {"method": "wina"},
    "scap": {"method": "scap"},
    "cats": {"method": "cats"},
}


def main() -> None:
    parser = harness.parser(__doc__, repeats=2)
    parser.add_argument("--model", type=Path, required=True, help="folder of a model")
    parser.add_argument("--dataset", required=True, help="folder of documents, or a Hub id")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["teal", "wina", "scap", "cats"])
    parser.add_argument("--levels", nargs="+", type=float, default=[0.25, 0.4, 0.5, 0.65])
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--calibration-tokens", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=16384, help="of the validation split")
    args = parser.parse_args()
    conditions = harness.begin(args)
    model: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(args.device).eval()
    options = {
        "tokenizer": AutoTokenizer.from_pretrained(args.model),
        "sequence_length": args.sequence_length,
    }
    texts = list(islice(training_texts(args.dataset), 400))
    held_out = list(islice(evaluation_texts(args.dataset), 200))

    def perplexity() -> float:
        return hf_sparse.measure(model, held_out, max_tokens=args.tokens, **options).perplexity

    rows: list[dict[str, Any]] = json.loads(args.out.read_text())["results"] if args.out.exists() else []
    sizes = {
        "model": args.model.name,
        "window": args.sequence_length,
        "calibration_tokens": args.calibration_tokens,
        "tokens": args.tokens,
    }
    if {key: row[key] for row in rows for key in sizes} not in ({}, sizes):
        raise SystemExit(f"{args.out} has rows of other sizes; move it away, or give --out.")
    if not rows:
        rows.append({**sizes, "method": "dense", "target": 0.0, "sparsity": 0.0, "perplexity": perplexity()})
    for name in args.methods:
        for level in args.levels:
            if any((row["method"], row["target"]) == (name, level) for row in rows):
                continue
            report = hf_sparse.calibrate(
                model,
                texts,
                target_sparsity=level,
                max_tokens=args.calibration_tokens,
                **METHODS[name],
                **options,
            )
            rows.append(
                {
                    **sizes,
                    "method": name,
                    "counts": report.counts,
                    "date": conditions["date"],
                    "command": conditions["command"],
                    "target": level,
                    "sparsity": report.sparsity,
                    "perplexity": perplexity(),
                }
            )
            print(name, level, f"{report.sparsity:.3f}", f"{rows[-1]['perplexity']:.2f}", flush=True)
            harness.save(args.out, conditions, rows)
            hf_sparse.unpatch(model)
    print("written to", args.out)


if __name__ == "__main__":
    main()
