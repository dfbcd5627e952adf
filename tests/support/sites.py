"""What passes the sites of tiny models, kept whole by hooks on modules that are named here."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

import hf_sparse
from support.models import tiny

_PLACES = {
    "llama": ("mlp.act_fn", "mlp.down_proj"),
    "opt": ("activation_fn", "fc2"),
    "gpt2": ("mlp.act", "mlp.c_proj"),
}


class Seen(NamedTuple):
    """Of one block: pre-activations and inputs of the down projection, a tensor ``[S, F]`` per sequence."""

    p: list[Tensor]
    h: list[Tensor]


def relu_model(family: str) -> PreTrainedModel:
    """A Llama that is patched with ReLU, or an OPT or GPT-2 that comes with it."""
    if family == "llama":
        model = tiny("llama")
        hf_sparse.patch(model, "relu")
        return model
    return tiny(family, activation_function="relu")


def seen(model: PreTrainedModel, batches: list[dict[str, Tensor]]) -> list[Seen]:
    """By block, what passes in a forward for each batch, without padding."""
    act, down = _PLACES[model.config.model_type]
    layers = next(
        module for name, module in model.named_modules() if name.endswith(("layers", "h")) and len(module)
    )
    found = [Seen([], []) for _ in layers]
    now: dict[tuple[int, str], Tensor] = {}

    def keep(key: tuple[int, str]) -> Any:
        return lambda module, args: now.__setitem__(key, args[0].clone())

    hooks = []
    for i, layer in enumerate(layers):
        hooks.append(layer.get_submodule(act).register_forward_pre_hook(keep((i, "p"))))
        hooks.append(layer.get_submodule(down).register_forward_pre_hook(keep((i, "h"))))
    for batch in batches:
        ids = batch["input_ids"]
        mask = batch.get("attention_mask", torch.ones_like(ids)).bool()
        positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
        given = {} if model.config.model_type == "opt" else {"position_ids": positions}
        with torch.no_grad():
            model(**batch, **given)
        for i, one in enumerate(found):
            for site in ("p", "h"):
                values = now[i, site].reshape(*ids.shape, -1)
                getattr(one, site).extend(row[kept] for row, kept in zip(values, mask, strict=True))
    for hook in hooks:
        hook.remove()
    return found


def padded(padding: str, sizes: tuple[int, ...] = (37, 9, 20, 34, 37)) -> dict[str, Tensor]:
    """A batch of sequences of these lengths, padded on one side; ``none``: all as long as the longest."""
    ids, mask = torch.randint(3, 128, (len(sizes), max(sizes))), torch.ones(len(sizes), max(sizes)).long()
    if padding == "none":
        return {"input_ids": ids}
    for row, size in zip(mask, sizes, strict=True):
        row[size:] = 0
    return {"input_ids": ids, "attention_mask": mask.flip(1) if padding == "left" else mask}
