"""Which parameters of an optimizer are perturbed, and what they are called."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from itertools import accumulate
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_sparse.checks import shown
from hf_sparse.sharpness.part import Inputs, Part

_WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}


def choose(
    optimizer: torch.optim.Optimizer, model: nn.Module | None, include: Sequence[str], exclude: Sequence[str]
) -> list[Part]:
    """The parameters that ``optimizer`` trains and the patterns select, in its order.

    Raises:
        ValueError: a pattern matches none, none is left, one is not ``model``'s, or they are sharded in a way
            in which no process can tell the norm of a gradient (DeepSpeed ZeRO, FSDP1).

    """
    _refuse_foreign_shards(optimizer, model)
    parts = list(_named(optimizer, model))
    names = [part.name for part in parts]
    for field, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns:
            if not any(matches(name, [pattern]) for name in names):
                raise ValueError(
                    f"{field}={shown(pattern)} matches no trained parameter, nor a module of one. Patterns "
                    f"are for whole names, such as {shown(names[0] if names else '')}; * is anything."
                )
    left = [p for p in parts if (not include or matches(p.name, include)) and not matches(p.name, exclude)]
    if not left:
        raise ValueError(
            f"include={shown(list(include))} and exclude={shown(list(exclude))} leave none of the "
            f"{len(parts)} trained parameters to perturb; select at least one."
        )
    return left


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a pattern of ``fnmatch`` is for the parameter ``name``, or for a module that holds it."""
    places = list(accumulate(name.split("."), "{}.{}".format))
    return any(fnmatchcase(place, pattern) for place in places for pattern in patterns)


def trained(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """The parameters that ``optimizer`` changes, in its order."""
    return [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]


def replicas(model: nn.Module | None) -> nn.parallel.DistributedDataParallel | None:
    """The DDP that ``model`` is, or is wrapped around."""
    return next(
        (one for one in _unwrapped(model) if isinstance(one, nn.parallel.DistributedDataParallel)), None
    )


def _refuse_foreign_shards(optimizer: torch.optim.Optimizer, model: nn.Module | None) -> None:
    """Refuse DeepSpeed and FSDP1, whose parameters do not say what of them lies where.

    Raises:
        ValueError: it is one of them.

    """
    holders = [optimizer, getattr(optimizer, "optimizer", None), *_unwrapped(model)]
    parameters = trained(optimizer)
    by_deepspeed = any("deepspeed" in type(one).__module__ for one in holders)
    if by_deepspeed or any(hasattr(p, "ds_id") for p in parameters):
        raise ValueError(
            "sharpness does not work with DeepSpeed ZeRO, which reduces and keeps gradients out of sight; "
            "use FSDP2 (accelerate: fsdp_version: 2), DDP or one process."
        )
    if any(getattr(p, "_fsdp_flattened", False) for p in parameters):
        raise ValueError(
            "sharpness does not work with FSDP1, whose shards are flat pieces of many parameters; use FSDP2 "
            "(torch.distributed.fsdp.fully_shard; accelerate: fsdp_version: 2)."
        )


def _named(optimizer: torch.optim.Optimizer, model: nn.Module | None) -> Iterator[Part]:
    if model is None:
        given = [name for group in optimizer.param_groups for name in group.get("param_names", ())]
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for index, parameter in enumerate(parameters):
            if parameter.requires_grad:
                yield Part(given[index] if len(given) == len(parameters) else str(index), parameter)
        return
    held = {id(p): (name, owner) for name, owner, p in _parameters(_bare(model))}
    for parameter in trained(optimizer):
        if id(parameter) not in held:
            raise ValueError(
                f"the optimizer has a parameter of shape {tuple(parameter.shape)} that the model does not "
                "have. Sharding exchanges parameters: build the optimizer after it, and sharpness from both."
            )
        name, owner = held[id(parameter)]
        yield Part(name, parameter, _inputs(owner, parameter))


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Parameter]]:
    """Every parameter with a name and the module that holds it, each once."""
    seen = set()
    for place, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                path = [one for one in [*place.split("."), name] if one and one not in _WRAPPERS]
                yield ".".join(path), module, parameter


def _inputs(owner: nn.Module, parameter: nn.Parameter) -> Inputs:
    if isinstance(owner, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return "flat"
    is_transposed = isinstance(owner, Conv1D) or (
        parameter.ndim == 3 and getattr(owner, "is_transposed", False)
    )
    return "transposed" if is_transposed else "last"


def _unwrapped(model: Any) -> Iterator[Any]:
    """``model``, what it wraps, what that wraps, and so on."""
    while model is not None:
        yield model
        is_ddp = isinstance(model, nn.parallel.DistributedDataParallel)
        model = model.module if is_ddp else model._modules.get("_orig_mod")  # compiled


def _bare(model: nn.Module) -> nn.Module:
    return list(_unwrapped(model))[-1]
