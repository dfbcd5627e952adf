"""A patched model of each kind of block, and the stock one that computes the same: ReLU put in by hand."""

from __future__ import annotations

import copy
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import hf_sparse
from hf_sparse.adapters import find_blocks
from support.models import tiny

KINDS = ("llama", "mixtral", "opt")
"""A whole module is exchanged; stacked experts; the module stays."""
IDS = torch.arange(3, 35).view(2, 16)

_OWN: dict[str, dict[str, object]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "opt": {"dropout": 0.0},  # so that two models train alike
}


def stock(kind: str, seed: int = 0, **changes: object) -> PreTrainedModel:
    """A tiny model of two layers, nothing of ours in it, in eval mode."""
    torch.manual_seed(seed)
    model = tiny(kind, **({"num_hidden_layers": 2} | _OWN.get(kind, {}) | changes))
    for parameter in model.parameters():
        if parameter.dim() == 3:  # of experts
            nn.init.normal_(parameter, std=0.2)
    return model


def by_hand(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a stock model with ReLU in the place of each activation of an MLP."""
    other = copy.deepcopy(model)
    for block in find_blocks(other)[0]:
        owner, _, name = block.roles.act.rpartition(".")
        block.module.get_submodule(owner)._modules[name] = nn.ReLU()
    return other


def twins(kind: str, seed: int = 0, **changes: object) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The patched model, and the stock one with ReLU: of the same weights, in memory of their own."""
    model = stock(kind, seed, **changes)
    other = by_hand(model)
    hf_sparse.patch(model, "relu")
    return model, other


def logits(model: nn.Module, backend: str = "dense", ids: Tensor = IDS, **inputs: Any) -> Tensor:
    with torch.no_grad(), hf_sparse.backend(backend):
        return model(input_ids=ids, use_cache=False, **inputs).logits


def assert_close(one: Any, other: Any, tolerance: float = 1e-4) -> None:
    """Equal but for the order in which the kernels add."""
    torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)


def tokenizer() -> PreTrainedTokenizerFast:
    """Of 128 words, ``w0`` to ``w127``; it pads on the left."""
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(128)}, unk_token="w3"))
    words.pre_tokenizer = Whitespace()
    special = {"pad_token": "w0", "bos_token": "w1", "eos_token": "w2", "unk_token": "w3"}
    return PreTrainedTokenizerFast(tokenizer_object=words, padding_side="left", **special)
