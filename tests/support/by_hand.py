"""Stock models with another activation, nothing of ours in them."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

import hf_sparse
from hf_sparse import SparsityConfig
from hf_sparse.activations import build_activation
from hf_sparse.adapters import find_blocks
from support.activations import FIELDS


def config_for(activation: str, **fields) -> SparsityConfig:
    return SparsityConfig.read(activation, **FIELDS[activation], **fields)


def swapped_by_hand(model: nn.Module, activation: str) -> nn.Module:
    """A copy of a stock model with another activation, nothing of ours in it."""
    other = copy.deepcopy(model)
    for index, block in enumerate(find_blocks(other)[0]):
        *_, name = block.roles.act.split(".")
        owner = block.module.get_submodule(block.roles.act.rpartition(".")[0])
        setattr(owner, name, build_activation(config_for(activation).activation, index, block.activation))
    return other


def logits(model: nn.Module, ids: Tensor, backend: str) -> Tensor:
    with torch.no_grad(), hf_sparse.backend(backend):
        return model(ids, use_cache=False).logits
