"""Decoding while another process spins on one of the cores: skipping against stock transformers.

    python benchmarks/busy_neighbour.py
    python benchmarks/busy_neighbour.py --model DIR        # a Llama-like model, saved by transformers
    python benchmarks/busy_neighbour.py --neighbours 2

Without ``--model`` it is a Llama of the shape of SmolLM2-135M with random weights: a small model, for a busy
neighbour costs time wherever threads meet, and there these places are closest together. Stock is the model as
it is, with its SiLU. For skipping, each layer has the FATReLU threshold that silences the wanted share of its
neurons on random prompts. Both run ``generate()`` with the same number of threads, by turns, with the machine
to themselves ("none"), with neighbours bound to the last cores ("bound"), and with neighbours that the
scheduler may move ("free").

"kept" is what is left of the speed of the undisturbed model in the same turn; "against stock" compares with
the stock model under the same load in the same turn.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import harness
import torch
from blocks import DTYPES, Shape
from generate import generation, silent_share, thresholds
from transformers import LlamaConfig, LlamaForCausalLM

import hf_sparse

LOADS = ("none", "bound", "free")
SPIN = "import os, sys\nif sys.argv[1:]: os.sched_setaffinity(0, [int(sys.argv[1])])\nwhile True: pass"
SETTLING_S = 0.3  # until the scheduler has seen the neighbour


@contextlib.contextmanager
def neighbours(load: str, count: int) -> Iterator[None]:
    """So many processes that do nothing but compute, each on a core of its own if they are bound."""
    cores = sorted(os.sched_getaffinity(0))[::-1]
    commands = [[str(cores[i % len(cores)])] if load == "bound" else [] for i in range(count)]
    processes = [
        subprocess.Popen([sys.executable, "-c", SPIN, *c]) for c in (commands if load != "none" else ())
    ]
    try:
        time.sleep(SETTLING_S)
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def build(args: argparse.Namespace) -> LlamaForCausalLM:
    """The stock model."""
    dtype = getattr(torch, args.dtype)
    if args.model:
        return LlamaForCausalLM.from_pretrained(args.model, dtype=dtype).eval()
    heads = args.shape.hidden // 64
    config = LlamaConfig(
        hidden_size=args.shape.hidden,
        intermediate_size=args.shape.neurons,
        num_hidden_layers=args.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 3 if heads % 3 == 0 else heads,
        vocab_size=args.vocab,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def main() -> None:
    parser = harness.parser(__doc__, repeats=7)
    parser.add_argument("--model", type=Path, help="folder of a model; default: random weights")
    parser.add_argument("--shape", type=Shape.of, default=Shape.of("576x1536"), help="of random MLPs")
    parser.add_argument("--vocab", type=int, default=49152, help="of random weights")
    parser.add_argument("--layers", type=int, default=30, help="of random weights")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--sparsity", type=float, default=0.9, help="share of silent neurons")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--neighbours", type=int, default=1, help="processes that spin")
    args = parser.parse_args()
    if args.device != "cpu" or not hasattr(os, "sched_setaffinity"):
        parser.error("it measures threads of a CPU under Linux; use --device cpu there")
    args.batch, args.static_cache = 1, False
    conditions = harness.begin(args)

    stock = build(args)
    prompt = torch.randint(1, stock.config.vocab_size, (1, 16))
    skipping = copy.deepcopy(stock)
    threshold = thresholds(skipping, prompt, args.sparsity)
    hf_sparse.patch(skipping, "fatrelu", threshold=threshold)
    runs = {
        "stock": harness.Run([generation(stock, prompt, "dense", args)], "cpu", graph=False),
        "skipping": harness.Run([generation(skipping, prompt, "auto", args)], "cpu", graph=False),
    }
    (quiet,) = runs["skipping"].outputs()
    silent = silent_share(skipping, quiet, prompt.shape[1])
    runs["stock"].outputs()
    seconds: dict[tuple[str, str], list[float]] = {(name, load): [] for load in LOADS for name in runs}
    for _ in range(args.repeats):
        for load in LOADS:
            with neighbours(load, args.neighbours):
                for name, run in runs.items():
                    seconds[name, load].append(run.seconds())
    with neighbours("free", args.neighbours):  # nor does a neighbour change what is computed
        harness.check_equal(runs["skipping"].outputs()[0], quiet, "tokens with a busy neighbour")

    rows = []
    for (name, load), own in seconds.items():
        timing = harness.Timing.of(own)
        kept = harness.Ratio.of(seconds[name, "none"], own)
        against = harness.Ratio.of(seconds["stock", load], own)
        rows.append(
            {
                "neighbour": load,
                "neighbours": args.neighbours if load != "none" else 0,
                "model": name,
                "generate": timing,
                "tokens_per_s": round(args.new_tokens / timing.median_ms * 1e3, 2),
                "kept": kept,
                "against_stock": against,
                "sparsity": round(silent, 4) if name == "skipping" else 0.0,
                "new_tokens": args.new_tokens,
                "hidden": stock.config.hidden_size,
                "neurons": stock.config.intermediate_size,
                "layers": stock.config.num_hidden_layers,
                "weights": "random" if args.model is None else args.model.name,
                "dtype": args.dtype,
            }
        )
    print(harness.table([cells(row) for row in rows]))
    harness.save(args.out, conditions, rows)
    print("written to", args.out)


def cells(row: dict[str, Any]) -> dict[str, str]:
    timing, kept, against = row["generate"], row["kept"], row["against_stock"]
    return {
        "neighbour": row["neighbour"],
        "model": row["model"],
        "seconds": f"{timing.median_ms / 1e3:.2f}",
        "quartiles": f"{timing.low_ms / 1e3:.2f}-{timing.high_ms / 1e3:.2f}",
        "tokens/s": f"{row['tokens_per_s']:.1f}",
        "kept": f"{kept.median:.0%}",
        "against stock": f"{against.median:.2f}x",
    }


if __name__ == "__main__":
    main()
