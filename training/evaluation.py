"""Loss, perplexity and activation sparsity on held-out text: ``hf_sparse.measure``, over all processes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from hf_sparse.metrics import SparsityReport, measure


def evaluate(
    accelerator: Accelerator, model: nn.Module, sequences: Tensor, *, batch_size: int
) -> SparsityReport:
    """Measure ``model`` on ``sequences`` (int64 [N, S], the same in every process, N at least their number).

    Each process takes every W-th sequence; the counts of all are added up.
    """
    own = sequences[accelerator.process_index :: accelerator.num_processes]
    most = -(-len(sequences) // accelerator.num_processes)
    reports = gather_object([measure(accelerator.unwrap_model(model), _batches(own, most, batch_size))])
    return merge(reports)


def merge(reports: list[SparsityReport]) -> SparsityReport:
    """One report from those of the same model on parts of the data."""
    predicted = sum(report.predicted_tokens for report in reports)
    layers = tuple(
        replace(parts[0], tokens=sum(p.tokens for p in parts), zeros=sum(p.zeros for p in parts))
        for parts in zip(*(report.layers for report in reports), strict=True)
    )
    return replace(
        reports[0],
        layers=layers,
        loss=sum(report.loss * report.predicted_tokens for report in reports) / predicted,
        tokens=sum(report.tokens for report in reports),
        predicted_tokens=predicted,
    )


def as_record(report: SparsityReport) -> dict[str, Any]:
    """A report for the log: plain numbers, and sparsity by block."""
    full = report.to_dict()
    kept = {name: full[name] for name in ("loss", "perplexity", "sparsity", "tokens")}
    return {**kept, "layers": {layer["name"]: layer["sparsity"] for layer in full["layers"]}}


def _batches(own: Tensor, most: int, batch_size: int) -> Iterator[dict[str, Tensor]]:
    """Batches of ``most`` sequences in all, as sharded models need in every process; filling is masked."""
    mask = torch.ones(most, own.shape[1], dtype=torch.int64)
    mask[len(own) :] = 0
    filled = torch.cat([own, own[: most - len(own)]])
    for ids, counted in zip(filled.split(batch_size), mask.split(batch_size), strict=True):
        yield {"input_ids": ids} if counted.all() else {"input_ids": ids, "attention_mask": counted}
