"""What the modules of Peng et al. add to training from scratch: vanilla (ReLU), each module alone, all three.

    OMP_NUM_THREADS=1 python benchmarks/from_scratch.py --dataset TEXT

trains a small T5 by span corruption and a small decoder on the same text, each in five variants of the
recipes t5_scratch and decoder_scratch, and writes docs/results/from_scratch.json and a table. TEXT is a
folder of documents with a validation split, as docs/training.md says. A run takes a few minutes on one core;
what was interrupted goes on where it stood when the command is given again, and a run that is in the JSON
file is not made again.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import training_runs
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from training_runs import of_kind
from transformers import LlamaConfig, PreTrainedTokenizerFast, T5Config

from hf_sparse.documents import Documents

ROOT = Path(__file__).resolve().parents[1]
LENGTH, WORDS, SENTINELS = 128, 2048, 20
COMMON = {
    "max_steps": 600,
    "global_batch": 16,
    "micro_batch": 16,
    "sequence_length": LENGTH,
    "epochs": 20,
    "eval_tokens": 32_768,
    "eval_every": 50,
    "save_every": 200,
    "log_every": 5,
    "learning_rate": 3e-3,
    "gradient_checkpointing": False,
}
TABLE, CLIP, CLAMP = {"positions": LENGTH}, {"zeroth_clip": {"share": 0.1}}, {"norm_clamp": {}}
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "vanilla": ({"activation": "relu"}, {}),
    "zeroth biases": ({"activation": "relu", "zeroth_bias": TABLE}, CLIP),
    "restricted norm": ({"activation": "relu"}, CLAMP),
    "J-SquaredReLU": ({"activation": "jsrelu"}, {}),
    "all three": ({"activation": "jsrelu", "zeroth_bias": TABLE}, {**CLIP, **CLAMP}),
}
MODELS = ("t5", "decoder")


def main() -> None:
    """Train what is not trained yet, and tell."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", required=True, help="folder of documents")
    parser.add_argument("--runs", type=Path, default=Path("runs/from_scratch"), help="default: %(default)s")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="default: 0")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, help="default: both")
    parser.add_argument("--steps", type=int, default=COMMON["max_steps"], help="default: %(default)s")
    parser.add_argument("--learning-rate", type=float, default=COMMON["learning_rate"])
    parser.add_argument("--json", type=Path, default=ROOT / "docs" / "results" / "from_scratch.json")
    arguments = parser.parse_args()
    fields = {**COMMON, "max_steps": arguments.steps, "learning_rate": arguments.learning_rate}
    prepare(arguments.runs / "models", arguments.dataset)
    results = training_runs.Results(arguments.json, fields)
    for seed, model, variant in product(arguments.seeds, arguments.models, VARIANTS):
        key = {"model": model, "variant": variant, "seed": seed}
        if results.has(key):
            continue
        output = arguments.runs / f"{model}-{variant.replace(' ', '-')}-{seed}"
        log = train(model, variant, seed, output, arguments.runs / "models", arguments.dataset, fields)
        results.add(key, told(log))
    print(table(results.rows))


def prepare(folder: Path, dataset: str) -> None:
    """A tokenizer of the text, with sentinels, and the configs of the two models beside it."""
    if (folder / "decoder" / "config.json").exists():
        return
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    sentinels = [f"<extra_id_{i}>" for i in range(SENTINELS)]
    trainer = trainers.BpeTrainer(
        vocab_size=WORDS,
        special_tokens=["<pad>", "</s>", *sentinels],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for text, _ in Documents(dataset).read("train", None)), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", extra_special_tokens=sentinels
    )
    own = {"vocab_size": len(fast), "pad_token_id": 0, "eos_token_id": 1}
    t5 = T5Config(
        **own,
        d_model=128,
        d_kv=32,
        d_ff=512,
        num_layers=3,
        num_heads=4,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    decoder = LlamaConfig(
        **own,
        bos_token_id=1,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
    )
    for name, config in (("t5", t5), ("decoder", decoder)):
        fast.save_pretrained(folder / name)
        config.save_pretrained(folder / name)


def train(
    model: str, variant: str, seed: int, output: Path, configs: Path, dataset: str, fields: dict[str, Any]
) -> list[dict[str, Any]]:
    """The log of one run."""
    patch, methods = VARIANTS[variant]
    own = {"model": configs / model, "dataset": dataset, "seed": seed, "patch": patch, "methods": methods}
    return training_runs.train(output, f"{model}_scratch", {**fields, **own})


def told(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Of a finished run: every evaluation, and the density in training, over all of it and its last tenth."""
    evaluated = [
        {"step": r["step"], "loss": r["loss"], "density": 1 - r["sparsity"]} for r in of_kind(records, "eval")
    ]
    trained = [1 - r["sparsity"] for r in of_kind(records, "train")]
    tenth = trained[-max(len(trained) // 10, 1) :]
    return {
        "parameters": of_kind(records, "run")[0]["parameters"],
        "training_density": statistics.fmean(trained),
        "training_density_end": statistics.fmean(tenth),
        "evaluations": evaluated,
    }


def at_loss(evaluations: Sequence[dict[str, float]], loss: float) -> float:
    """The density where the held-out loss first came down to ``loss``, between evaluations by a line.

    Raises:
        ValueError: it never did.

    """
    for before, after in pairwise(evaluations):
        if after["loss"] <= loss <= before["loss"]:
            share = (before["loss"] - loss) / ((before["loss"] - after["loss"]) or 1.0)
            return before["density"] + share * (after["density"] - before["density"])
    raise ValueError(f"no evaluation came down to a loss of {loss:.4f}.")


def table(runs: Sequence[dict[str, Any]]) -> str:
    """Markdown: means over seeds; the equal loss is the highest final one of the runs of a model and seed."""
    lines = [
        "| model | variant | loss | inference density | at equal loss | training density | at its end "
        "| less than vanilla: inference, at equal loss, training |",
        "|---|---|---:|---:|---:|---:|---:|---|",
    ]
    for model in dict.fromkeys(run["model"] for run in runs):
        vanilla: list[float] = []
        for variant in VARIANTS:
            rows = [
                _numbers(run, [r for r in runs if (r["model"], r["seed"]) == (model, run["seed"])])
                for run in runs
                if (run["model"], run["variant"]) == (model, variant)
            ]
            loss, *densities = (statistics.fmean(column) for column in zip(*rows, strict=True))
            vanilla = vanilla or densities
            less = [f"{1 - densities[i] / vanilla[i]:+.0%}" for i in (0, 1, 2)]
            shown = [f"{loss:.3f}", *(f"{density:.1%}" for density in densities), ", ".join(less)]
            lines.append(f"| {' | '.join([model, variant, *shown])} |")
    return "\n".join(lines)


def _numbers(run: dict[str, Any], compared: Sequence[dict[str, Any]]) -> list[float]:
    """Loss, inference density, that at the equal loss, and training density, whole and at the end."""
    equal = max(other["evaluations"][-1]["loss"] for other in compared)
    last = run["evaluations"][-1]
    training = [run["training_density"], run["training_density_end"]]
    return [last["loss"], last["density"], at_loss(run["evaluations"], equal), *training]


if __name__ == "__main__":
    main()
