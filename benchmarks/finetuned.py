"""Greedy ``generate()`` of finetuned sparse checkpoints on real prompts: skipping against dense, end to end.

    python benchmarks/finetuned.py --dense DENSE --sparse NAME=CHECKPOINT NAME=CHECKPOINT --dataset TEXT

DENSE is the checkpoint that was finetuned without a patch; each CHECKPOINT is one with. Competitors, by
turns: DENSE as transformers runs it; each CHECKPOINT run dense; as the package runs it, skipping; and, with
--compile, skipping in a compiled step.
Speed-ups are against DENSE. Prompts are the beginnings of documents of the validation split of TEXT. Before
any timing the logits are compared with those of the same checkpoint in float32: skipping must not be clearly
further off than dense.
"""

from __future__ import annotations

import copy
from itertools import islice
from pathlib import Path
from typing import Any

import generate
import harness
import torch
from blocks import DTYPES
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_sparse
from hf_sparse.texts import evaluation_texts


def main() -> None:
    parser = harness.parser(__doc__, repeats=5)
    parser.add_argument("--dense", type=Path, required=True, help="folder of the baseline")
    parser.add_argument(
        "--sparse",
        nargs="+",
        required=True,
        metavar="NAME=FOLDER",
        help="patched models, and what to call them",
    )
    parser.add_argument("--compile", action="store_true", help="one competitor more of each: a compiled step")
    parser.add_argument("--dataset", required=True, help="folder of documents, or a Hub id")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=16)
    args = parser.parse_args()
    args.static_cache = False
    conditions = harness.begin(args)
    prompts = beginnings(args, 8)

    found: dict[str, tuple[Any, str]] = {"dense": (load(args.dense, args), "dense")}
    errors, silent = {}, {}
    for one in args.sparse:
        name, _, place = one.rpartition("=")
        folder = Path(place)
        name = name or named(folder)
        model = load(folder, args)
        if not hf_sparse.inspect(model).patched:
            raise SystemExit(f"{folder} is not patched; give it as --dense.")
        own = copy.deepcopy(model)
        found[f"{name}, run dense"] = (own, "dense")
        skipping = {f"{name}, skipping": model}
        if args.compile:
            compiled = copy.deepcopy(own)
            hf_sparse.prepare(compiled, compile=True)
            skipping[f"{name}, compiled"] = compiled
        found |= {label: (form, "auto") for label, form in skipping.items()}
        tokens = generate.generation(model, prompts[0], "auto", args)()
        checked = generate.check_logits(own, skipping, tokens, args.prompt_tokens, "auto")
        errors |= {label: checked[label] for label in skipping}
        errors[f"{name}, run dense"] = checked["patched, dense"]
        silent |= dict.fromkeys(
            (*skipping, f"{name}, run dense"), generate.silent_share(own, tokens, args.prompt_tokens)
        )
    runs = {
        name: harness.Run(
            [generate.generation(model, prompt, backend, args) for prompt in prompts],
            args.device,
            graph=False,
        )
        for name, (model, backend) in found.items()
    }
    for run in runs.values():
        run.outputs()  # warm
    times, ratios = harness.interleaved(runs, args.repeats)
    rows = [
        {
            **generate.speed(name, timing, ratios[name], args.new_tokens),
            "sparsity": round(silent.get(name, 0.0), 4),
            "prompts": len(prompts),
            "prompt_tokens": args.prompt_tokens,
            "new_tokens": args.new_tokens,
            "dtype": args.dtype,
            "logit_error": errors.get(name),
        }
        for name, timing in times.items()
    ]
    print(harness.table([generate.speed_cells(row) for row in rows]))
    harness.save(args.out, conditions, rows)
    print("written to", args.out)


def beginnings(args: Any, documents: int) -> list[Tensor]:
    """Of so many documents the first tokens, each ``[1, prompt_tokens]``; none of one that is shorter."""
    tokenizer = AutoTokenizer.from_pretrained(args.dense)
    texts = islice(evaluation_texts(args.dataset), documents)
    ids = [tokenizer(text, return_tensors="pt").input_ids[:, : args.prompt_tokens] for text in texts]
    return [one.to(args.device) for one in ids if one.shape[1] == args.prompt_tokens]


def load(folder: Path, args: Any) -> Any:
    dtype = getattr(torch, args.dtype)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(args.device).eval()


def named(folder: Path) -> str:
    """Of a run's ``final`` the name of the run."""
    return folder.parent.name if folder.name == "final" else folder.name


if __name__ == "__main__":
    main()
