"""How a user's model is run to be observed: whatever it is wrapped in, wherever its weights lie."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from transformers import PreTrainedModel


def without_copies(model: nn.Module) -> nn.Module:
    """The module that ``DistributedDataParallel``, ``DataParallel`` or ``torch.compile`` was given.

    What they add is of no use to an observer: gradients in step, copies on other devices that hooks of this
    process would miss, and a graph that was traced before there were any hooks.
    """
    while True:
        if isinstance(model, DistributedDataParallel | DataParallel):
            model = model.module
        elif isinstance(inner := model._modules.get("_orig_mod"), nn.Module):
            model = inner
        else:
            return model


def inner_model(model: nn.Module) -> Any:
    """The transformers model that is, or is in, ``model``.

    Raises:
        ValueError: there is none.

    """
    inner = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)
    if inner is None:
        raise ValueError(f"{type(model).__name__} is no transformers model, and contains none.")
    return inner


def input_device(model: PreTrainedModel) -> torch.device:
    """Where ``model`` takes its input: where its embeddings run, which need not be where they are kept."""
    try:
        embeddings: nn.Module = model.get_input_embeddings()
    except NotImplementedError:
        embeddings = model
    for module in (embeddings, model):
        for device in (*_execution_devices(module), *(p.device for p in module.parameters())):
            if device.type != "meta":  # where offloaded weights seem to be
                return device
    return torch.device("cpu")


def _execution_devices(module: nn.Module) -> Iterator[torch.device]:
    """What the hooks of accelerate in ``module`` run its parts on."""
    for part in module.modules():
        hook = getattr(part, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):
            if (device := getattr(one, "execution_device", None)) is not None:
                yield torch.device(device)


@contextmanager
def observed(model: nn.Module, *, grad: bool = False) -> Iterator[None]:
    """Eval mode, no gradient unless ``grad``, no compiled graph; afterwards every module is in its own mode.

    ``no_grad``, and no inference mode even inside of one: tensors that are made there, as the gathered
    weights of a sharded model or the frequencies of a rotary embedding, can never be trained with.
    """
    modes = [(module, module.training) for module in model.modules()]
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(grad))
        if "torch._dynamo" in sys.modules:  # else nothing was compiled, and importing it takes seconds
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training


@contextmanager
def takes_gradients(model: nn.Module, inner: PreTrainedModel) -> Iterator[None]:
    """Gradients reach every activation after the embeddings of ``inner``, and no parameter of ``model``."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def required(module: nn.Module, args: Any, embedded: torch.Tensor) -> torch.Tensor:
        return embedded.detach().requires_grad_()

    handles = [one.register_forward_hook(required) for one in _embeddings(inner)]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter in trained:
            parameter.requires_grad_(True)


def _embeddings(model: PreTrainedModel) -> list[nn.Module]:
    """Those of ``model``, and of each stack of an encoder-decoder, which need not be the same modules."""
    stacks: list[PreTrainedModel] = [model]
    if getattr(model.config, "is_encoder_decoder", False):
        stacks += [model.get_encoder(), model.get_decoder()]
    found = []
    for stack in stacks:
        try:
            found.append(stack.get_input_embeddings())
        except NotImplementedError:  # such as of an encoder of speech
            continue
    return list(dict.fromkeys(found))
