"""Fisher information of parameters: sums of squared gradients of single samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, distributed, nn

from hf_sparse.sharpness.chosen import replicas
from hf_sparse.sharpness.part import Part

Batch = dict[str, Tensor]


def sum_of_squares(
    gradient: Callable[[Batch], object],
    batch: Mapping[str, Tensor],
    samples: int,
    parts: Sequence[Part],
    trained: Sequence[nn.Parameter],
    model: nn.Module | None,
) -> list[Tensor]:
    """The sum over ``samples`` samples, those in ``batch`` of all processes, float32, of the local shapes.

    Gradients of several samples must not mix: with DDP each process keeps its own, and the sums are added up;
    with FSDP2, which averages over processes, all compute the same sample at the same time.

    Raises:
        ValueError: they are not so many, or DDP is not seen.

    """
    ddp = replicas(model)
    is_sharded = any(part.is_sharded for part in parts)
    own = [{name: tensor[i : i + 1] for name, tensor in batch.items()} for i in range(_length(batch))]
    several = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
    if several and not is_sharded and ddp is None:
        raise ValueError(
            "update_mask does not know how processes share their gradients: build the sharpness with the "
            "model that DistributedDataParallel or fully_shard gave."
        )
    todo = _of_all(own, parts[0].local().device) if several and is_sharded else own
    found = len(todo)
    if ddp is not None:
        counts = torch.tensor(found, device=parts[0].local().device)
        distributed.all_reduce(counts, group=ddp.process_group)
        found = int(counts)
    if found != samples or not samples:
        raise ValueError(
            f"update_mask was given {found} samples over all processes, and {samples} are due. Ask "
            "samples_due after each update, and give the samples once."
        )

    kept = [parameter.grad for parameter in trained]
    fisher = [torch.zeros_like(part.local(), dtype=torch.float32) for part in parts]
    try:
        for sample in todo:
            for parameter in trained:
                parameter.grad = None
            with ddp.no_sync() if ddp is not None else nullcontext():
                gradient(sample)
            with torch.no_grad():
                for value, part in zip(fisher, parts, strict=True):
                    if (of := part.gradient()) is not None:
                        value.addcmul_(of.float(), of.float())
    finally:
        for parameter, before in zip(trained, kept, strict=True):
            parameter.grad = before
    if ddp is not None:
        for value in fisher:
            distributed.all_reduce(value, group=ddp.process_group)
    return fisher


def _length(batch: Mapping[str, Tensor]) -> int:
    sizes = {len(tensor) for tensor in batch.values()}
    if len(sizes) != 1:
        raise ValueError(
            f"the tensors of a batch have {sorted(sizes)} samples; each needs one row per sample."
        )
    return sizes.pop()


def _of_all(own: list[Batch], device: torch.device) -> list[Batch]:
    """The samples of all processes, in the order of these."""
    lists: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(lists, [{name: value.cpu() for name, value in one.items()} for one in own])
    return [{name: value.to(device) for name, value in one.items()} for some in lists for one in some]
