"""The report of a finished run, from its log: ``report.md`` and two plots beside it."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from run_log import read_log

from hf_sparse.markdown_table import markdown_table
from hf_sparse.metrics import DEFINITION

Record = dict[str, Any]

_PRECISION = {
    name: f", computed in {name}; the weights that are saved are float32" for name in ("bf16", "fp16")
}


def write_report(folder: Path, recipe: Record, became: str | None = None) -> Path:
    """Write ``report.md`` of the run of ``recipe`` in ``folder``, and plots if matplotlib is installed.

    ``became`` is what the activation is in the end, in words.
    """
    records = read_log(folder / "log.jsonl")
    about = next(record for record in records if record["kind"] == "run")
    original = next((record for record in records if record["kind"] == "original"), None)
    trained = [record for record in records if record["kind"] == "train"]
    evaluated = [record for record in records if record["kind"] == "eval"]
    plots: list[str] = []
    if find_spec("matplotlib") is not None:
        from final_plots import draw_layers, draw_run

        plots = [draw_run(folder, trained, evaluated), draw_layers(folder, original, evaluated)]
    about["recipe"] = recipe  # some of it may be another one than when the run began
    parts = [
        f"# {folder.resolve().name}: {recipe['model']}, trained for activation sparsity",
        _told(about, trained, evaluated, became),
        _states(original, evaluated, random=recipe.get("from_scratch", False)),
        f"{DEFINITION[0].upper()}{DEFINITION[1:]}; on held-out text, {evaluated[-1]['tokens']:,} tokens in "
        f"windows of {recipe['sequence_length']:,}{_PRECISION.get(recipe['precision'], '')}.",
        *(f"![{name.partition('.')[0].replace('-', ' ')}]({name})" for name in plots),
        "## By layer",
        _layers(original, evaluated),
        "## On the way",
        markdown_table(
            ["update", "perplexity", "sparsity"],
            [[str(r["step"]), _number(r["perplexity"]), f"{r['sparsity']:.2%}"] for r in evaluated],
        ),
        "## Recipe",
        f"```yaml\n{yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True).strip()}\n```",
        "## Machine and versions",
        markdown_table(["", ""], [[k, str(v)] for k, v in _surroundings(about).items()]),
    ]
    path = folder / "report.md"
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path


def _told(about: Record, trained: Sequence[Record], evaluated: Sequence[Record], became: str | None) -> str:
    recipe = about["recipe"]
    said = [
        f"{about['architecture']} of {about['parameters']:,} parameters, patched with `{recipe['patch']}`, "
        f"trained on {recipe['dataset']}"
    ]
    if mix_in := recipe.get("mix_in"):
        said.append(f" and, for {mix_in['share']:.0%} of the sequences, on {mix_in['dataset']}")
    if recipe["methods"]:
        said.append(f", with {', '.join(f'`{name}`' for name in recipe['methods'])}")
    if trained:
        last = trained[-1]
        said.append(f". {last['step']:,} updates, {last['tokens']:,} tokens")
        if seconds := _seconds(trained):
            waited = sum(part * record["data_wait"] for part, record in seconds)
            whole = sum(part for part, _ in seconds)
            said.append(
                f", {_duration(whole)} of training at {last['tokens'] / whole:,.0f} tokens/s, of which "
                f"{waited / whole:.1%} were spent waiting for data"
            )
        if bad := last.get("bad_documents"):
            said.append(f". {bad:,} documents could not be used")
    if became is not None:
        said.append(f". In the end the activation is {became}")
    return "".join(said) + "."


def _seconds(trained: Sequence[Record]) -> list[tuple[float, Record]]:
    """How long the updates before each record took, evaluations and checkpoints left out."""
    found, before = [], 0
    for record in trained:
        if record["tokens_per_second"]:
            found.append(((record["tokens"] - before) / record["tokens_per_second"], record))
        before = record["tokens"]
    return found


def _states(original: Record | None, evaluated: Sequence[Record], *, random: bool) -> str:
    """The model before, with another activation, and trained."""
    names = ("random weights" if random else "original", "patched, not trained", "final")
    states = zip(names, (original, evaluated[0], evaluated[-1]), strict=True)
    rows = []
    for name, r in states:
        if r is not None:
            dead = f"{r['dead']:,}" if r.get("dead") is not None else ""
            shares = [f"{r['sparsity']:.2%}", f"{1 - r['sparsity']:.2%}", dead]
            rows.append([name, _number(r["loss"]), _number(r["perplexity"]), *shares])
    return markdown_table(["", "loss", "perplexity", "sparsity", "density", "dead neurons"], rows)


def _layers(original: Record | None, evaluated: Sequence[Record]) -> str:
    first, last = evaluated[0], evaluated[-1]
    rows = []
    for name, share in last["layers"].items():
        before = [record["layers"].get(name) for record in (original, first) if record is not None]
        dead = last.get("dead_by_layer", {}).get(name)
        rows.append([f"`{name}`", *map(_share, [*before, share]), "" if dead is None else f"{dead:,}"])
    head = ["MLP block", *(["original"] if original else []), "patched", "final", "dead neurons"]
    return markdown_table(head, rows)


def _surroundings(about: Record) -> dict[str, Any]:
    return {
        "processes": about["processes"],
        "device": about["device"],
        **about.get("machine", {}),
        **about.get("versions", {}),
    }


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.2%}"


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s"
