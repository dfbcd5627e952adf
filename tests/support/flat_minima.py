"""One process of two that train with the methods on flat minima: ``python -m support.flat_minima FILE``.

``trained`` is a training; rank 0 writes the parameters after it, by way of data parallelism, into FILE.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import hf_sparse
from hf_sparse.methods import ActingTogether, Training, read_methods
from support.models import tiny
from support.sharded import IDS, ddp, fsdp2

PATCH = {"activation": "jsrelu", "zeroth_bias": {"positions": 20}}
BOUNDS: Mapping[str, Any] = {"norm_uplift": {"until": 1.0}, "zeroth_clip": {}}
RESCALED: Mapping[str, Any] = {"norm_rescale": {}, **BOUNDS}
STEPS = 3


def patched(kind: str = "gpt_neox", patch: Any = PATCH) -> nn.Module:
    """A tiny model in training mode, whose norms have gains of both signs around 0 and biases."""
    torch.manual_seed(0)
    changes = {"attention_dropout": 0.0, "hidden_dropout": 0.0} if kind == "gpt_neox" else {}
    model = tiny(kind, num_hidden_layers=2, tie_word_embeddings=False, **changes)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter, std=0.5)
    hf_sparse.patch(model, patch)
    return model.train()


def trained(
    model: nn.Module,
    own: Tensor,
    methods: Mapping[str, Any] = BOUNDS,
    wrap: Callable[[nn.Module], nn.Module] = lambda model: model,
) -> nn.Module:
    """``model`` after three updates with ``methods`` on ``own [B, S]``, this process's text."""
    acting = ActingTogether(read_methods(methods), Training(model, STEPS))
    wrapped = wrap(model)
    groups: dict[float, list[nn.Parameter]] = {0.5: [], 20.0: []}
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            groups[20.0 if "zeroth_bias" in name else 0.5].append(parameter)
    optimizer = torch.optim.SGD([{"params": group, "lr": lr} for lr, group in groups.items() if group])
    for step in range(1, STEPS + 1):
        acting.before_step(step)
        wrapped(input_ids=own, labels=own, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        acting.after_step(step)
    acting.detach()
    return wrapped


def main() -> None:
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    found = {}
    for name, methods, wrap in (
        ("ddp", BOUNDS, ddp),
        ("fsdp2", BOUNDS, fsdp2),
        ("fsdp2, rescaled", RESCALED, fsdp2),
    ):
        model = trained(patched(), IDS[2 * rank : 2 * rank + 2], methods, wrap)
        state = {k.removeprefix("module."): v for k, v in model.state_dict().items()}
        found[name] = {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in state.items()}
    if rank == 0:
        torch.save(found, sys.argv[1])
    torch.distributed.barrier()


if __name__ == "__main__":
    main()
