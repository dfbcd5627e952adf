"""Loss, perplexity and activation sparsity on held-out text: ``hf_sparse.measure``, over all processes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from hf_sparse.metrics import SparsityReport, measure

ORIGINAL, LATEST = "measured/original.json", "measured/latest.json"
"""Where a run keeps the reports of the model before the patch, and of its last evaluation."""


def evaluate(
    accelerator: Accelerator, model: nn.Module, inputs: dict[str, Tensor], *, batch_size: int
) -> SparsityReport:
    """Measure ``model`` on ``inputs`` (int64 [N, …], the same in all processes, N at least their number).

    Each process takes every W-th sequence; the reports of all add up.
    """
    own = {k: rows[accelerator.process_index :: accelerator.num_processes] for k, rows in inputs.items()}
    most = -(-len(inputs["input_ids"]) // accelerator.num_processes)
    own_report = measure(accelerator.unwrap_model(model), _batches(own, most, batch_size))
    return replace(sum(gather_object([own_report])), sequence_length=inputs["input_ids"].shape[1])


def keep(report: SparsityReport, file: Path) -> None:
    """Write a report, for ``kept``."""
    file.parent.mkdir(parents=True, exist_ok=True)
    _of_the_model(report).to_json(file)


def kept(file: Path) -> SparsityReport | None:
    """The report in a file; None if there is none, as of the original of a sharded model."""
    return SparsityReport.from_json(file) if file.exists() else None


def as_record(report: SparsityReport) -> dict[str, Any]:
    """A report for the log: plain numbers, and by block sparsity and dead neurons, where these are known."""
    report = _of_the_model(report)
    full = report.to_dict()
    kept = {name: full[name] for name in ("loss", "perplexity", "sparsity", "tokens")}
    kept["layers"] = {layer["name"]: layer["sparsity"] for layer in full["layers"]}
    if (dead := report.dead) is not None:
        kept |= {"dead": dead, "dead_by_layer": {layer.name: layer.dead for layer in report.layers}}
    return kept


def _of_the_model(report: SparsityReport) -> SparsityReport:
    """A report with names of the model itself, also if adapters were around it."""
    layers = (replace(layer, name=bare_name(layer.name)) for layer in report.layers)
    return replace(report, layers=tuple(layers))


def bare_name(name: str) -> str:
    """That of a module in the model itself, as it is saved."""
    return name.removeprefix("base_model.model.")


def _batches(own: dict[str, Tensor], most: int, batch_size: int) -> Iterator[dict[str, Tensor]]:
    """Batches of ``most`` sequences in all, as sharded models need in every process; filling is masked."""
    count = len(own["input_ids"])
    mask = torch.ones(most, own["input_ids"].shape[1], dtype=torch.int64)
    mask[count:] = 0
    filled = {name: torch.cat([rows, rows[: most - count]]) for name, rows in own.items()}
    if "labels" in filled:
        filled["labels"][count:] = -100
    filled["attention_mask"] = mask
    for begin in range(0, most, batch_size):
        batch = {name: rows[begin : begin + batch_size] for name, rows in filled.items()}
        if batch["attention_mask"].all():
            del batch["attention_mask"]
        yield batch
