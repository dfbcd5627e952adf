"""What the methods of finetuning do to one model on one text, at equal tokens: sparsity against perplexity.

    OMP_NUM_THREADS=1 python benchmarks/finetuning.py --model MODEL --dataset TEXT --name finetuning

trains MODEL with every variant below, for each of --seeds, writes docs/results/NAME.json and NAME.svg, and
prints a table.
--steps, --learning-rate, --sequence-length and --batch set what all of them share, --l1-scale the scale of
coefficients that were published for LLaMA2-7B. A sharpness variant takes twice the time of the others and the
same tokens. What was interrupted goes on where it stood when the command is given again; a run that is in
NAME.json is not made again.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from training_runs import ROOT, Results, of_kind, train

_L1 = {"methods.target_sparsity.lever": "l1"}
_CATS = {"patch": "cats_silu"}
_AS_PUBLISHED = {"mixing": {"until": 0.3}, "norm_uplift": {"until": 0.3}, "zeroth_clip": {"share": 0.1}}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("dense", {}),
    "ReLU": ("relu", {}),
    "shifted ReLU 0.1": ("shifted_relu", {"patch.activation.shift": 0.1}),
    "dReLU": ("drelu", {}),
    "stage 2": ("relu_stage2", {}),
    "top-k 0.2": ("topk", {"patch.topk.share": 0.2}),
    "statistical top-k 0.8": ("statistical_topk", {}),
    "L1": ("l1", {"methods.l1.scale": "scale"}),
    "ProSparse": ("prosparse", {"methods.l1.scale": "scale"}),
    "target 80 %": ("target_sparsity", {"methods.target_sparsity.sparsity": 0.8}),
    "target 90 %": ("target_sparsity", {"methods.target_sparsity.sparsity": 0.9}),
    "target 80 %, CATS": ("target_sparsity", {**_CATS, "methods.target_sparsity.sparsity": 0.8}),
    "target 90 %, CATS": ("target_sparsity", {**_CATS, "methods.target_sparsity.sparsity": 0.9}),
    "target 80 %, L1": ("target_sparsity", {**_L1, "methods.target_sparsity.sparsity": 0.8}),
    "target 90 %, L1": ("target_sparsity", {**_L1, "methods.target_sparsity.sparsity": 0.9}),
    "flat minima": ("flat_minima", {}),
    "flat minima, uplift alone": ("flat_minima", {"methods": _AS_PUBLISHED}),
    "flat minima, LoRA": ("flat_minima_lora", {}),
    "weight noise": ("weight_noise", {}),
    "SAM": ("sam", {}),
    "Sparse SAM, Fisher": ("sparse_sam_fisher", {"sharpness.samples": 8}),
    "Sparse SAM, dynamic": ("sparse_sam_dynamic", {}),
    "Fisher SAM": ("fisher_sam", {}),
    "distillation": ("distill", {}),
    "block-wise": ("blockwise", {}),
}


def main() -> None:
    """Train what is not trained yet, and tell."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder or Hub id")
    parser.add_argument("--dataset", required=True, help="folder of documents")
    parser.add_argument("--name", required=True, help="of the files in docs/results")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="default: %(default)s")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="default: 0")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--steps", type=int, default=300, help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=8, help="sequences of an update; default: %(default)s")
    parser.add_argument("--micro-batch", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--sequence-length", type=int, default=256, help="default: %(default)s")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="default: %(default)s")
    parser.add_argument("--l1-scale", type=float, default=25.0, help="default: %(default)s")
    parser.add_argument("--precision", default="fp32", help="fp32 or bf16; default: %(default)s")
    parser.add_argument("--eval-tokens", type=int, default=65_536, help="default: %(default)s")
    arguments = parser.parse_args()
    common = {
        "model": arguments.model,
        "dataset": arguments.dataset,
        "max_steps": arguments.steps,
        "global_batch": arguments.batch,
        "micro_batch": arguments.micro_batch,
        "sequence_length": arguments.sequence_length,
        "learning_rate": arguments.learning_rate,
        "precision": arguments.precision,
        "weight_decay": 0.1,
        "beta2": 0.95,
        "warmup": 0.05,
        "decay": "cosine",
        "epochs": 20,
        "eval_tokens": arguments.eval_tokens,
        "eval_every": math.ceil(arguments.steps / 4),
        "save_every": math.ceil(arguments.steps / 4),
        "log_every": 10,
        "gradient_checkpointing": False,
    }
    folder = ROOT / "docs" / "results"
    fields = {k: v for k, v in common.items() if k not in ("model", "dataset")}
    results = Results(folder / f"{arguments.name}.json", {**fields, "l1_scale": arguments.l1_scale})
    for seed, variant in product(arguments.seeds, arguments.variants):
        recipe, own = VARIANTS[variant]
        key = {"variant": variant, "recipe": recipe, "seed": seed}
        if results.has(key):
            continue
        own = {k: arguments.l1_scale if v == "scale" else v for k, v in own.items()}
        if recipe.startswith("flat_minima"):
            own["patch.zeroth_bias.positions"] = arguments.sequence_length
        if recipe == "distill" and arguments.precision == "bf16":
            own["methods.distillation.teacher_dtype"] = "bfloat16"
        output = arguments.runs / arguments.name / f"{recipe}-{'-'.join(map(str, own.values()))}-{seed}"
        log = train(output, recipe, {**common, **own, "seed": seed})
        results.add(key, told(log))
    found = sorted(results.rows, key=lambda row: (list(VARIANTS).index(row["variant"]), row["seed"]))
    draw(found, folder / f"{arguments.name}.svg")
    print(table(found))


def told(log: list[dict[str, Any]]) -> dict[str, Any]:
    """Of a finished run: the model before, and every evaluation."""
    kept = ("step", "loss", "perplexity", "sparsity", "layers")
    evaluations = [{name: record[name] for name in kept} for record in of_kind(log, "eval")]
    (original,) = of_kind(log, "original")
    return {"original": original["perplexity"], "evaluations": evaluations}


def table(runs: Sequence[dict[str, Any]]) -> str:
    """Markdown: means over seeds and, of several, their range; perplexity also over that of ``dense``."""
    ends = {variant: _ends(runs, variant) for variant in dict.fromkeys(run["variant"] for run in runs)}
    dense = statistics.fmean(p for p, _ in ends["dense"]) if "dense" in ends else None
    lines = ["| variant | recipe | perplexity | to dense | sparsity |", "|---|---|---:|---:|---:|"]
    original = statistics.fmean(run["original"] for run in runs)
    lines.append(f"| original model, not trained | | {original:.2f} | | |")
    for variant, points in ends.items():
        perplexities, sparsities = zip(*points, strict=True)
        recipe = next(run["recipe"] for run in runs if run["variant"] == variant)
        to_dense = f"{statistics.fmean(perplexities) / dense - 1:+.1%}" if dense else ""
        shown = [_spread(perplexities, "{:.2f}"), to_dense, _spread(sparsities, "{:.1%}")]
        lines.append(f"| {variant} | `{recipe}` | {' | '.join(shown)} |")
    return "\n".join(lines)


def draw(runs: Sequence[dict[str, Any]], path: Path) -> None:
    """The end of every run as a point: sparsity against perplexity."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    groups: list[tuple[float, float, list[str]]] = []  # of variants too close together for a label each
    for variant in dict.fromkeys(run["variant"] for run in runs):
        points = _ends(runs, variant)
        perplexity = statistics.fmean(p for p, _ in points)
        sparsity = 100 * statistics.fmean(s for _, s in points)
        axes.plot([100 * s for _, s in points], [p for p, _ in points], ".", color="tab:blue", alpha=0.4)
        near = [names for x, y, names in groups if abs(x - sparsity) < 2 and abs(y / perplexity - 1) < 0.06]
        if near:
            near[0].append(variant)
        else:
            groups.append((sparsity, perplexity, [variant]))
    for x, y, names in groups:
        left = {"ha": "right", "va": "center", "xytext": (-6, 0)} if len(names) > 1 else {"xytext": (4, 4)}
        axes.annotate("\n".join(names), (x, y), textcoords="offset points", fontsize=8, **left)
    axes.set(xlabel="sparsity, % of the inputs of the down projections", ylabel="perplexity", yscale="log")
    axes.set_xlim(-3, 107)
    axes.margins(y=0.15)
    axes.yaxis.set_major_formatter("{x:.0f}")
    axes.yaxis.set_minor_formatter("{x:.0f}")
    axes.grid(alpha=0.3, which="both")
    figure.savefig(path)
    plt.close(figure)


def _ends(runs: Sequence[dict[str, Any]], variant: str) -> list[tuple[float, float]]:
    last = [run["evaluations"][-1] for run in runs if run["variant"] == variant]
    return [(one["perplexity"], one["sparsity"]) for one in last]


def _spread(values: Sequence[float], form: str) -> str:
    mean = form.format(statistics.fmean(values))
    return mean if len(values) == 1 else f"{mean} ({form.format(min(values))} to {form.format(max(values))})"


if __name__ == "__main__":
    main()
