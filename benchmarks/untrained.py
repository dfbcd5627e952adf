"""What a patch alone does to the embedded model: perplexity and sparsity without training; nothing is timed.

    python benchmarks/untrained.py

Text is the documentation of the running Python: its held-out documents, in windows of the model's context.
Thresholds of CATS are chosen on its training documents.
"""

from __future__ import annotations

from typing import Any

import harness
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_sparse
from hf_sparse.assets import TINY_MODEL
from hf_sparse.assets.corpus import python_corpus

PATCHES: dict[str, dict[str, Any]] = {
    "as it is": {},
    "ReLU": {"activation": "relu"},
    "shifted ReLU 0.1": {"activation": {"name": "shifted_relu", "shift": 0.1}},
    "ReLU, and after norms (stage 2)": {"activation": "relu", "norm_relu": True},
    "J-SquaredReLU": {"activation": "jsrelu"},
    "dReLU": {"activation": "drelu"},
    **{f"top-k {share}": {"activation": "original", "topk": {"share": share}} for share in (0.5, 0.3, 0.1)},
    **{
        f"statistical top-k {silent}": {"activation": "original", "statistical_topk": {"sparsity": silent}}
        for silent in (0.5, 0.8)
    },
}
CATS = (0.5, 0.7, 0.9)


def main() -> None:
    parser = harness.parser(__doc__, repeats=2)
    parser.add_argument("--tokens", type=int, default=65_536)
    args = parser.parse_args()
    conditions = harness.begin(args)
    corpus = python_corpus()
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
    rows: list[dict[str, Any]] = []

    def add(name: str, model: Any) -> None:
        report = hf_sparse.measure(model, corpus.held_out, tokenizer=tokenizer, max_tokens=args.tokens)
        row = {"patch": name, "perplexity": report.perplexity, "sparsity": report.sparsity}
        rows.append({**row, "tokens": report.tokens, "window": report.sequence_length})
        print(f"{name:40} {report.perplexity:8.2f} {report.sparsity:7.1%}", flush=True)

    for name, patch in PATCHES.items():
        model = embedded(args.device)
        if patch:
            hf_sparse.patch(model, hf_sparse.SparsityConfig.from_dict(patch))
        add(name, model)
    for share in CATS:
        model = embedded(args.device)
        hf_sparse.calibrate(model, corpus.train, method="cats", target_sparsity=share, tokenizer=tokenizer)
        add(f"CATS {share}", model)
    harness.save(args.out, conditions, rows)
    print("written to", args.out)


def embedded(device: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(TINY_MODEL, dtype=torch.float32).to(device).eval()


if __name__ == "__main__":
    main()
