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
    accelerator: Accelerator, model: nn.Module, sequences: Tensor, *, batch_size: int
) -> SparsityReport:
    """Measure ``model`` on ``sequences`` (int64 [N, S], the same in every process, N at least their number).

    Each process takes every W-th sequence; the reports of all add up.
    """
    own = sequences[accelerator.process_index :: accelerator.num_processes]
    most = -(-len(sequences) // accelerator.num_processes)
    own_report = measure(accelerator.unwrap_model(model), _batches(own, most, batch_size))
    return replace(sum(gather_object([own_report])), sequence_length=sequences.shape[1])


def keep(report: SparsityReport, file: Path) -> None:
    """Write a report, for ``kept``."""
    file.parent.mkdir(parents=True, exist_ok=True)
    _of_the_model(report).to_json(file)


def kept(file: Path) -> SparsityReport:
    """The report in a file."""
    return SparsityReport.from_json(file)


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


def _batches(own: Tensor, most: int, batch_size: int) -> Iterator[dict[str, Tensor]]:
    """Batches of ``most`` sequences in all, as sharded models need in every process; filling is masked."""
    mask = torch.ones(most, own.shape[1], dtype=torch.int64)
    mask[len(own) :] = 0
    filled = torch.cat([own, own[: most - len(own)]])
    for ids, counted in zip(filled.split(batch_size), mask.split(batch_size), strict=True):
        yield {"input_ids": ids} if counted.all() else {"input_ids": ids, "attention_mask": counted}
