"""Loss, perplexity and activation sparsity on held-out text: ``hf_sparse.measure``, over all processes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from hf_sparse.metrics import SparsityReport, measure


def evaluate(
    accelerator: Accelerator, model: nn.Module, inputs: dict[str, Tensor], *, batch_size: int
) -> SparsityReport:
    """Measure ``model`` on ``inputs`` (int64 [N, …], the same in all processes, N at least their number).

    Each process takes every W-th sequence; the reports of all add up.
    """
    own = {k: rows[accelerator.process_index :: accelerator.num_processes] for k, rows in inputs.items()}
    most = -(-len(inputs["input_ids"]) // accelerator.num_processes)
    return sum(gather_object([measure(accelerator.unwrap_model(model), _batches(own, most, batch_size))]))


def as_record(report: SparsityReport) -> dict[str, Any]:
    """A report for the log: plain numbers, and sparsity by block."""
    full = report.to_dict()
    kept = {name: full[name] for name in ("loss", "perplexity", "sparsity", "tokens")}
    return {**kept, "layers": {layer["name"]: layer["sparsity"] for layer in full["layers"]}}


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
