"""Trainings with perturbed weights, the same for one process and for several."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse.sharpness import Perturbation, read

IDS = torch.randint(3, 128, (8, 16), generator=torch.Generator().manual_seed(0))
WAYS: dict[str, dict[str, Any]] = {
    "sam": {"name": "sam"},
    "fisher": {"name": "sparse_sam_fisher", "samples": 4, "interval": 2},
    "structured": {"name": "sparse_sam_fisher", "samples": 4, "interval": 2, "pattern": "structured"},
    "2:4": {"name": "sparse_sam_fisher", "samples": 4, "interval": 2, "pattern": "2:4"},
    "dynamic": {"name": "sparse_sam_dynamic", "interval": 2, "keep": 0.3},
    "fisher_sam": {"name": "fisher_sam", "interval": 2},
}
STEPS = 5


def built(way: str, model: nn.Module, optimizer: torch.optim.Optimizer, **changes: Any) -> Perturbation:
    return read({**WAYS[way], "rho": 0.2, **changes}).build(optimizer, model, steps=STEPS)


def loss(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def update(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    perturbation: Perturbation | None,
    micro_batches: Iterable[Tensor],
    sample: Tensor | None = None,
) -> None:
    """One update on micro-batches of equal size; ``sample [N, S]`` is what Fisher masks are made of."""
    pieces = list(micro_batches)
    quiet = getattr(model, "no_sync", nullcontext)

    def gradients() -> None:
        optimizer.zero_grad()
        for i, ids in enumerate(pieces):
            with nullcontext() if i == len(pieces) - 1 else quiet():
                (loss(model, ids) / len(pieces)).backward()

    gradients()
    if perturbation is not None:
        with perturbation.perturbed():
            gradients()
    optimizer.step()
    if perturbation is not None and perturbation.samples_due:
        ids = torch.cat(pieces)[: perturbation.samples_due] if sample is None else sample
        perturbation.update_mask(one_sample(model), {"input_ids": ids})


def one_sample(model: nn.Module) -> Callable[[Mapping[str, Tensor]], None]:
    def gradient(sample: Mapping[str, Tensor]) -> None:
        loss(model, sample["input_ids"]).backward()

    return gradient


def bits(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Copies that are equal only if all bits are: of zeros and NaN, too."""
    return [tensor.detach().clone().view(torch.int32) for tensor in tensors]


def set_gradients(parameters: Iterable[nn.Parameter], values: Iterable[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.grad = value.clone()
