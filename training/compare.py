"""Compare finished runs of finetune.py: `python training/compare.py runs/dense runs/relu runs/prosparse`.

Prints a table of perplexity and sparsity on held-out text, and what differs between the recipes. With --json
it writes the same with every evaluation, every layer, the recipes, and the machine.
"""

from __future__ import annotations

import argparse
import json
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from run_log import read_log

from hf_sparse.surroundings import machine
from triton_ops.table import table as columns


def main() -> None:
    """Read the runs, print the table, write the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="output_dir of each run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the comparison to this file")
    arguments = parser.parse_args()
    runs = [read_run(folder) for folder in arguments.runs]
    print(table(runs))
    if arguments.json:
        date = datetime.now(timezone.utc).strftime("%Y-%m-%d")
        whole = {"date": date, "machine": machine(), "runs": runs}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


def read_run(folder: Path) -> dict[str, Any]:
    """What a finished run did and found; ends the program where there is none."""
    try:
        records = read_log(folder / "log.jsonl")
    except FileNotFoundError:
        sys.exit(f"error: {folder} has no log.jsonl; give the output_dir of a run.")
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        by_kind.setdefault(record.pop("kind"), []).append(record)
    about, evaluations = by_kind["run"][0], by_kind.get("eval", [])
    ends = [by_kind[kind][-1]["step"] for kind in ("eval", "train") if kind in by_kind]
    if not evaluations or ends[0] != ends[-1] or ends[0] < about["recipe"]["max_steps"]:
        sys.exit(f"error: the run in {folder} is not finished; continue it with --resume.")
    tokens = by_kind["train"][-1]["tokens"]
    original = next(iter(by_kind.get("original", [])), None)
    return {"name": folder.name, **about, "tokens": tokens, "original": original, "evaluations": evaluations}


def table(runs: list[dict[str, Any]]) -> str:
    """One line for each run, and one for each original model."""
    rows = [["", "tokens", "perplexity", "sparsity", "density"]]
    seen = []
    for run in runs:
        if run["original"] and run["original"]["loss"] not in seen:
            seen.append(run["original"]["loss"])
            rows.append(_row("original model", 0, run["original"]))
    rows += [_row(run["name"], run["tokens"], run["evaluations"][-1]) for run in runs]
    lines = [columns(rows)]
    recipes = [run["recipe"] for run in runs]
    for name in recipes[0]:
        values = [recipe.get(name) for recipe in recipes]
        if name != "output_dir" and any(value != values[0] for value in values):
            lines.append(
                f"{name}: " + "; ".join(f"{r['name']} {v}" for r, v in zip(runs, values, strict=True))
            )
    return "\n".join(lines)


def _row(name: str, tokens: int, found: dict[str, Any]) -> list[str]:
    sparsity = found["sparsity"]
    return [name, f"{tokens:,}", f"{found['perplexity']:.3f}", f"{sparsity:.2%}", f"{1 - sparsity:.2%}"]


if __name__ == "__main__":
    main()
