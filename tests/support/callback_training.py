"""A training by transformers.Trainer with SparsityCallback, in this process or as one of two.

python -m support.callback_training FOLDER      # of a group, as RANK and WORLD_SIZE say
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

import hf_sparse
from hf_sparse.methods import Acting, Method, Term, Training
from support.models import untrained_llama

METHODS = {
    "l1": {"boundaries": [0.5, 1.0], "targets": [2.0, 8.0]},
    "mixing": {"until": 0.5},
    "distillation": {"task": 0.5},
}
DISTRIBUTED: dict[str, Any] = {
    "lengths": (12, 5, 9),
    "evaluate": True,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 1,  # six sequences by two processes: none is repeated to fill a batch
}
PAD = 0


@dataclass(frozen=True, kw_only=True)
class Pull(Method):
    """Adds the square of the first norm's weights, with a weight that its state alone knows."""

    name = "pull"

    def attach(self, training: Training) -> Acting:
        return Pulling(training.model)


class Pulling(Acting):
    def __init__(self, model: nn.Module) -> None:
        self.weight = 0.0
        self.batches: list[Mapping[str, Any]] = []
        self.reports: list[tuple[int, Any]] = []
        self.model = model

    def loss(self, step: int, batch: Mapping[str, Tensor], output: Any) -> dict[str, Term]:
        self.batches.append(batch)
        norm = next(p for p in self.model.parameters() if p.dim() == 1)
        return {"pull": Term(norm.square().sum(), self.weight)}

    def after_step(self, step: int) -> None:
        self.weight += 0.1

    def after_evaluation(self, step: int, report: Any) -> None:
        self.reports.append((step, report))

    def state_dict(self) -> dict[str, Any]:
        return {"weight": self.weight}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.weight = state["weight"]


def sequences(count: int, lengths: tuple[int, ...]) -> list[dict[str, list[int]]]:
    """Of these lengths in turn, filled to the longest, with the prompt left out of the labels."""
    generator = torch.Generator().manual_seed(5)
    longest = max(lengths)
    found = []
    for i in range(count):
        size = lengths[i % len(lengths)]
        ids = torch.randint(3, 128, (size,), generator=generator).tolist()
        filled = longest - size
        labels = [-100, -100, *ids[2:], *[-100] * filled] if len(lengths) > 1 else ids
        row = {"input_ids": ids + [PAD] * filled, "labels": labels}
        found.append({**row, "attention_mask": [1] * size + [0] * filled})
    return found


def models() -> tuple[PreTrainedModel, PreTrainedModel]:
    """A patched model and the dense one, the same in every process."""
    torch.manual_seed(3)
    dense = untrained_llama(num_hidden_layers=2)
    model = copy.deepcopy(dense)
    hf_sparse.patch(model, "relu")
    return model, dense


def trainer(
    folder: Path,
    methods: Any,
    *,
    lengths: tuple[int, ...] = (12,),
    evaluate: bool = False,
    examples: int = 32,
    trainer_class: Any = Trainer,
    options: Mapping[str, Any] | None = None,
    **arguments: Any,
) -> Any:
    """Ready to train; ``options`` go to the trainer, ``arguments`` to its arguments."""
    model, dense = models()
    given = {
        "max_steps": 4,
        "per_device_train_batch_size": 8,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 2,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        **({"eval_strategy": "steps", "eval_steps": 2} if evaluate else {}),
        **arguments,
    }
    return trainer_class(
        model,
        TrainingArguments(str(folder), **given),
        train_dataset=sequences(examples, lengths),
        eval_dataset=sequences(6, lengths),
        callbacks=[hf_sparse.SparsityCallback(methods, dense=dense)],
        **(options or {}),
    )


def run(made: Any, **resume: Any) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Weights and log of a training."""
    made.train(**resume)
    weights = {name: p.detach().clone() for name, p in made.model.named_parameters()}
    return weights, made.state.log_history


def main() -> None:
    folder = Path(sys.argv[1])
    made = trainer(folder / "trainer", METHODS, **DISTRIBUTED, gradient_accumulation_steps=2)
    weights, log = run(made)
    try:
        trainer(folder / "trainer", {"blockwise": {}}).train()
        refused = ""
    except ValueError as error:
        refused = str(error)
    if made.args.process_index == 0:
        torch.save(weights, folder / "weights.pt")
        (folder / "log.json").write_text(json.dumps([log, refused]))


if __name__ == "__main__":
    main()
