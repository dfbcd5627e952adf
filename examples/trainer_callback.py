"""Make a model sparse with transformers.Trainer: ReLU, distillation from the dense model, and progressive L1.

    python examples/trainer_callback.py --output runs/trainer
    python examples/trainer_callback.py --output runs/trainer --model ./my-model --learning-rate 1e-4

The embedded model and the running Python's own documentation need no network. About two minutes on one core.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import hf_sparse
from hf_sparse.assets import TINY_MODEL
from hf_sparse.assets.corpus import python_corpus
from hf_sparse.windows import windows

METHODS = {
    "distillation": {"task": 0.5, "forward_kl": 0.5, "reverse_kl": 0.5},
    "l1": {"start": 0.2, "boundaries": [0.4, 0.8, 1.0], "targets": [0.05, 0.5, 0.5]},
}


def main() -> None:
    """Measure, patch, train, measure, save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for checkpoints and the model")
    parser.add_argument("--model", default=str(TINY_MODEL), help="default: the embedded model")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    args = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    corpus = python_corpus()

    def sequences(texts: tuple[str, ...], count: int) -> list[dict[str, torch.Tensor]]:
        packed = windows(
            texts, tokenizer, sequence_length=args.length, batch_size=1, max_tokens=count * args.length
        )
        return [{"input_ids": ids[0], "labels": ids[0]} for ids in packed if ids.shape[1] == args.length]

    train, held_out = sequences(corpus.train, 16 * args.steps), sequences(corpus.held_out, 32)
    batches = [{"input_ids": row["input_ids"][None]} for row in held_out]
    print("dense:", summary(hf_sparse.measure(model, batches)))
    hf_sparse.patch(model, "relu")
    print("ReLU in its place:", summary(hf_sparse.measure(model, batches)))

    Trainer(
        model,
        TrainingArguments(
            str(args.output),
            max_steps=args.steps,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            learning_rate=args.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=args.steps // 20,
            logging_steps=max(1, args.steps // 10),
            eval_strategy="steps",
            eval_steps=max(1, args.steps // 4),
            save_steps=max(1, args.steps // 2),
            report_to=[],
        ),
        train_dataset=train,
        eval_dataset=held_out,
        callbacks=[
            hf_sparse.SparsityCallback(
                METHODS, dense=lambda: AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
            )
        ],
    ).train()
    print("trained:", summary(hf_sparse.measure(model, batches)))
    model.save_pretrained(args.output / "final")
    tokenizer.save_pretrained(args.output / "final")


def summary(report: hf_sparse.SparsityReport) -> str:
    """Both numbers that matter."""
    return f"perplexity {report.perplexity:.2f}, sparsity {report.sparsity:.1%}"


if __name__ == "__main__":
    main()
