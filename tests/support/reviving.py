"""One process of two that revive dead neurons of a shared model: ``python -m support.reviving FILE``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hf_sparse
from hf_sparse.adapters import find_blocks
from hf_sparse.methods import Training
from hf_sparse.methods.revival import Revival
from support.models import tiny
from support.sharded import fsdp1, fsdp2

IDS = torch.arange(3, 67).view(4, 16) % 128


def patched(kind: str) -> nn.Module:
    torch.manual_seed(0)
    model = tiny(kind, num_hidden_layers=2, tie_word_embeddings=False).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    hf_sparse.patch(model, "relu")
    with torch.no_grad():
        for block in find_blocks(model)[0]:
            block.weights()[0][0][::7] = 0
    return model


def story(
    model: Any,
    ids: Tensor,
    wrap: Callable[[nn.Module], nn.Module] = lambda model: model,
    shared: bool = False,
) -> tuple[Tensor, float]:
    """The deciding weights of all blocks, ``[2, F, D]``, after a revival, and the share of dead neurons."""

    def mean(value: Tensor) -> Tensor:
        if shared:
            torch.distributed.all_reduce(value)
        return value / 2 if shared else value

    acting = Revival(window=2, strength=0.5).attach(Training(model, steps=2, mean=mean))
    wrapped = wrap(model)
    for step in (1, 2):
        acting.before_step(step)
        wrapped(input_ids=ids, labels=ids).loss.backward()
        with torch.no_grad():
            acting.after_step(step)
        wrapped.zero_grad()
    acting.detach()
    weights = [block.weights()[0][0].detach() for block in find_blocks(model)[0]]
    whole = [weight.full_tensor() if hasattr(weight, "full_tensor") else weight for weight in weights]
    return torch.stack(whole), acting.values()["dead_neurons"]


def refusal(model: nn.Module, ids: Tensor, wrap: Callable[[nn.Module], nn.Module]) -> str:
    with pytest.raises(hf_sparse.PatchError) as refused:
        story(model, ids, wrap, True)
    return str(refused.value)


def main() -> None:
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    own = IDS[2 * rank : 2 * rank + 2]
    found = {
        "one process": story(patched("llama"), IDS),
        "ddp": story(patched("llama"), own, nn.parallel.DistributedDataParallel, True),
        "fsdp2": story(patched("llama"), own, fsdp2, True),
        "fsdp1": refusal(patched("llama"), own, fsdp1),
        "fsdp2 of a layer for both": refusal(patched("phi3"), own, fsdp2),
    }
    if rank == 0:
        torch.save(found, sys.argv[1])
    torch.distributed.barrier()


if __name__ == "__main__":
    main()
