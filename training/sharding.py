"""Training of which each process holds a part: what differs from one that holds the whole model."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator, init_empty_weights
from accelerate.utils import DistributedType, DynamoBackend
from recipe import Recipe
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from hf_sparse.adapters.roles import shape

_RAM_EFFICIENT = "FSDP_CPU_RAM_EFFICIENT_LOADING"


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether each process holds only a part of the weights."""
    return accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)


def layout(accelerator: Accelerator) -> str:
    """How weights and optimizer lie over the processes, in one word."""
    return accelerator.distributed_type.value if is_sharded(accelerator) else "whole"


def fit(accelerator: Accelerator, recipe: Recipe) -> None:
    """Let the recipe decide what DeepSpeed's config decides otherwise, and refuse what is not to be.

    Raises:
        ValueError: the recipe cannot be sharded this way.

    """
    if not is_sharded(accelerator):
        return
    if accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
        raise ValueError("compile cannot be sharded yet: train under data parallelism, or set compile=false.")
    if recipe.lora:
        raise ValueError("lora cannot be sharded yet: train it under data parallelism, or set lora=none.")
    if accelerator.distributed_type == DistributedType.FSDP:
        if not accelerator.is_fsdp2:
            raise ValueError("fsdp_version=1 is not supported: set fsdp_version: 2 in accelerate's config.")
        return
    config = accelerator.deepspeed_plugin.deepspeed_config
    zero = config["zero_optimization"]
    if zero.get("stage") == 3 and not zero.get("stage3_gather_16bit_weights_on_model_save"):
        raise ValueError(
            "zero3_save_16bit_model=false would leave the trained model in pieces: set "
            "zero3_save_16bit_model: true in accelerate's config."
        )
    config["train_micro_batch_size_per_gpu"] = recipe.micro_batch
    config["gradient_accumulation_steps"] = 1  # the loop weighs and counts micro-batches itself
    config["gradient_clipping"] = recipe.clip_norm


def reads_no_weights(accelerator: Accelerator) -> bool:
    """Whether this process gets its part of the weights from another one, which reads them."""
    return (
        accelerator.distributed_type == DistributedType.FSDP
        and accelerator.state.fsdp_plugin.cpu_ram_efficient_loading
        and not accelerator.is_main_process
    )


def without_weights(build: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    """What ``build`` makes, with parameters that are memory reserved and never touched.

    They lie on the CPU, not on meta: accelerate tells the parameters of an optimizer apart by their address.
    Buffers are as they should be.
    """
    with init_empty_weights(include_buffers=False):
        model = build()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            reserved = torch.empty_like(parameter, device="cpu")
            setattr(module, name, nn.Parameter(reserved, parameter.requires_grad))
    model.tie_weights()
    return model


@contextmanager
def whole_in_every_process(accelerator: Accelerator) -> Iterator[None]:
    """Models loaded meanwhile are what they are without FSDP and ZeRO-3."""
    before = os.environ.get(_RAM_EFFICIENT)
    os.environ[_RAM_EFFICIENT] = "false"
    plugin = (
        accelerator.deepspeed_plugin if accelerator.distributed_type == DistributedType.DEEPSPEED else None
    )
    if plugin is not None:
        unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if plugin is not None:
            set_hf_deepspeed_config(plugin.dschf)
        if before is None:
            del os.environ[_RAM_EFFICIENT]
        else:
            os.environ[_RAM_EFFICIENT] = before


def size(model: nn.Module) -> int:
    """Parameters of the whole model."""
    return sum(_numel(parameter) for parameter in model.parameters())


def whole_state(accelerator: Accelerator, model: nn.Module) -> dict[str, Tensor]:
    """Names and gathered weights, complete in the main process. All processes have to ask."""
    bare = accelerator.unwrap_model(model, keep_torch_compile=False)
    if not is_sharded(accelerator):
        return bare.state_dict()
    state: dict[str, Tensor] = accelerator.get_state_dict(model) or {}
    # Gathering parts tied weights, of which the first is to be saved.
    names = {name for name, _ in bare.named_parameters()}
    every = {name for name, _ in bare.named_parameters(remove_duplicate=False)}
    return {name: value for name, value in state.items() if name in names or name not in every}


def _numel(parameter: nn.Parameter) -> int:
    count = 1
    for n in shape(parameter):
        count *= n
    return count
