"""One of two processes that train with perturbed weights: ``python -m support.sharp_sharded FOLDER``.

Rank 0 writes weights and masks there, by way of perturbing and of data parallelism.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

from hf_sparse.sharpness import Perturbation, SamConfig
from support.models import untrained_llama
from support.sharded import ddp, fsdp1, fsdp2
from support.sharp import IDS, STEPS, WAYS, built, loss, one_sample, update

SAMPLES = [0, 1, 4, 5]
"""The first two of each process."""
Run = tuple[nn.Module, torch.optim.Optimizer, Perturbation]
WRAPS: dict[str, Callable[[nn.Module], nn.Module]] = {"ddp": ddp, "fsdp2": fsdp2}


def llama(neurons: int = 87) -> nn.Module:
    """With an odd number of neurons, so that shards differ in size."""
    torch.manual_seed(0)
    return untrained_llama(num_hidden_layers=1, intermediate_size=neurons)


def by_columns() -> nn.Module:
    """Sharded in the last dimension of each parameter."""
    model = llama(88)
    fully_shard(model, shard_placement_fn=lambda p: Shard(p.ndim - 1))
    return model


def fresh(way: str, wrap: Callable[[nn.Module], nn.Module]) -> Run:
    model = wrap(llama())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    return model, optimizer, built(way, model, optimizer)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    perturbation: Perturbation,
    own: Tensor,
    sample: Tensor,
    steps: int,
) -> None:
    for _ in range(steps):
        update(model, optimizer, perturbation, own.split(2), sample)


def whole(tensor: Tensor) -> Tensor:
    found = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return found.detach().clone()


def result(model: nn.Module, perturbation: Perturbation) -> dict[str, dict[str, Tensor]]:
    weights = {name.removeprefix("module."): whole(p) for name, p in model.named_parameters()}
    return {"weights": weights, "masks": {k: whole(v) for k, v in perturbation.state_dict()["masks"].items()}}


def story(way: str, kind: str, rank: int, folder: Path) -> dict[str, dict[str, Tensor]]:
    own = IDS[4 * rank : 4 * rank + 4]
    model, optimizer, perturbation = one = fresh(way, WRAPS[kind])
    train(*one, own, own[:2], 3)

    def finish(run: Run) -> dict[str, dict[str, Tensor]]:
        train(*run, own, own[:2], STEPS - 3)
        return result(run[0], run[2])

    file = folder / f"{way}-{kind}.safetensors"
    perturbation.save(file)
    others = []
    if kind == "fsdp2":  # goes on from here, of the saved masks
        torch.distributed.barrier()
        others = [other := fresh(way, WRAPS[kind])]
        other[0].load_state_dict(copy.deepcopy(model.state_dict()))
        other[1].load_state_dict(copy.deepcopy(optimizer.state_dict()))
        other[2].load(file)
        other[2].load_state_dict(other[2].state_dict())
    found, *again = (finish(each) for each in (one, *others))
    for part, tensors in found.items():
        assert all(
            torch.equal(tensor, each[part][name]) for each in again for name, tensor in tensors.items()
        )
    return found


def refusals() -> None:
    model = fsdp1(llama())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="does not work with FSDP1"):
        SamConfig().build(optimizer, model)

    model = by_columns()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"'model.embed_tokens.weight' are cut by its sharding"):
        built("2:4", model, optimizer)

    model = llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    perturbation = built("fisher", model, optimizer)
    loss(model, IDS).backward()
    with perturbation.perturbed():
        pass
    with pytest.raises(ValueError, match="how processes share their gradients"):
        perturbation.update_mask(one_sample(model), {"input_ids": IDS[:2]})
    with pytest.raises(ValueError, match="Sharding exchanges parameters"):
        SamConfig().build(optimizer, fsdp2(llama()))


def random_mask(model: nn.Module) -> dict[str, Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return {k: whole(v) for k, v in built("dynamic", model, optimizer).state_dict()["masks"].items()}


def main() -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank, folder = torch.distributed.get_rank(), Path(sys.argv[1])
    found: dict[str, Any] = {
        f"{way} {kind}": story(way, kind, rank, folder) for way in WAYS for kind in WRAPS
    }
    found["random by columns"] = random_mask(by_columns())
    refusals()
    if rank == 0:
        torch.save(found, folder / "found.pt")
    torch.distributed.barrier()


if __name__ == "__main__":
    main()
