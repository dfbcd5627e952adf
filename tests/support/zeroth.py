"""Models with zeroth biases, and what is compared of them."""

from __future__ import annotations

import copy
import threading
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import hf_sparse
from support.models import tiny, tiny_t5
from support.peek import zeroth_biases

POSITIONS = 24


def biased(
    kind: str = "llama",
    activation: str = "relu",
    placement: str = "input",
    positions: int = POSITIONS,
    **changes: object,
) -> PreTrainedModel:
    """A tiny model with tables that are far from zero; T5 as well."""
    torch.manual_seed(0)
    model = tiny_t5(**changes) if kind == "t5" else tiny(kind, **changes)
    table = {"placement": placement, "positions": positions}
    hf_sparse.patch(model, {"activation": activation, "zeroth_bias": table})
    for one in zeroth_biases(model):
        nn.init.normal_(one)
    return model


def logits(model: nn.Module, input_ids: Tensor | None = None, **inputs: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=input_ids, **inputs).logits


def left_padded(ids: Tensor, by: int) -> tuple[Tensor, Tensor]:
    """``ids`` after ``by`` pads, and the mask."""
    padded = torch.cat((torch.zeros(len(ids), by, dtype=torch.int64), ids), dim=1)
    return padded, (torch.arange(padded.shape[1]) >= by).long().expand_as(padded)


def gradients(model: nn.Module, batches: list[dict[str, Tensor]], *, thread: bool = False) -> list[Tensor]:
    """After all forwards, one backward of the sum."""
    model = copy.deepcopy(model).train()
    model.config.use_cache = False
    loss = torch.stack([model(**batch).loss for batch in batches]).sum()
    if thread:  # as the engine does for a GPU
        runner = threading.Thread(target=loss.backward)
        runner.start()
        runner.join()
    else:
        loss.backward()
    return [parameter.grad for parameter in model.parameters()]
