"""Several tokens at a time: batches, and decoding that guesses ahead (prompt lookup), skipping against dense.

    python benchmarks/several_tokens.py --dense DENSE --sparse CHECKPOINT --dataset TEXT

DENSE is a checkpoint that was finetuned without a patch, CHECKPOINT one with. A step for several tokens reads
what any of them needs, so it skips less. Greedy ``generate()``: with batches of prompts of one length, the
beginnings of documents of the validation split of TEXT; and with one prompt and drafts of some tokens that
transformers looks up in the text so far, which one step verifies. The tokens are those of decoding without
drafts (in bfloat16 but for ties: several tokens are summed in another order). "tokens a step" counts what was
accepted. All take turns; a ratio is to the dense model in the same use, and one to the same model without.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import generate
import harness
import torch
from blocks import DTYPES
from finetuned import beginnings, load

import hf_sparse


def main() -> None:
    parser = harness.parser(__doc__, repeats=5)
    parser.add_argument("--dense", type=Path, required=True, help="folder of the baseline")
    parser.add_argument("--sparse", type=Path, required=True, help="folder of the patched model")
    parser.add_argument("--dataset", required=True, help="folder of documents, or a Hub id")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--drafts", type=int, nargs="+", default=[2, 4, 8], help="tokens that are guessed")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=96)
    args = parser.parse_args()
    args.static_cache = False
    conditions = harness.begin(args)
    models = {"dense": load(args.dense, args), "skipping": load(args.sparse, args)}
    if not hf_sparse.inspect(models["skipping"]).patched:
        raise SystemExit(f"{args.sparse} is not patched; give it as --dense.")
    hf_sparse.prepare(models["skipping"])
    prompts = torch.cat(beginnings(args, 8 * max(args.batches)))
    if len(prompts) < max(args.batches):
        raise SystemExit(f"only {len(prompts)} of the first documents have {args.prompt_tokens} tokens.")

    uses = [(batch, 0) for batch in args.batches] + [(1, draft) for draft in args.drafts]
    calls = {
        (name, batch, draft): generate.generation(model, prompts[:batch], "auto", args, **drafting(draft))
        for batch, draft in uses
        for name, model in models.items()
    }
    runs = {label: harness.Run([call], "cpu", graph=False) for label, call in calls.items()}
    steps = {label: steps_of(models[label[0]], runs[label]) for label in runs}  # the warm-up, too
    times, _ = harness.interleaved(runs, args.repeats)
    rows = [
        {
            "model": name,
            "batch": batch,
            "draft": draft,
            "generate": timing,
            "tokens_per_s": round(batch * args.new_tokens / timing.median_ms * 1e3, 2),
            "tokens_per_step": round(args.new_tokens / steps[name, batch, draft], 2),
            "to_dense": round(times["dense", batch, draft].median_ms / timing.median_ms, 3),
            "to_one_by_one": round(batch * times[name, 1, 0].median_ms / timing.median_ms, 3),
            "new_tokens": args.new_tokens,
            "prompt_tokens": args.prompt_tokens,
            "dtype": args.dtype,
        }
        for (name, batch, draft), timing in times.items()
    ]
    print(harness.table([cells(row) for row in rows]))
    harness.save(args.out, conditions, rows)
    print("written to", args.out)


def drafting(tokens: int) -> dict[str, int]:
    """The option of ``generate()`` for drafts of so many tokens."""
    return {"prompt_lookup_num_tokens": tokens} if tokens else {}


def steps_of(model: Any, run: harness.Run) -> int:
    """How many times one call of ``generate()`` calls the model."""
    counted: list[int] = []
    handle = model.register_forward_pre_hook(lambda *_: counted.append(1))
    try:
        run.outputs()
    finally:
        handle.remove()
    return len(counted)


def cells(row: dict[str, Any]) -> dict[str, str]:
    return {
        "model": row["model"],
        "batch": str(row["batch"]),
        "draft": str(row["draft"] or ""),
        "tokens/s": f"{row['tokens_per_s']:.1f}",
        "tokens a step": f"{row['tokens_per_step']:.2f}",
        "to dense": f"{row['to_dense']:.2f}",
        "to one by one": f"{row['to_one_by_one']:.2f}",
    }


if __name__ == "__main__":
    main()
