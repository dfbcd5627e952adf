"""The weights of layers' linear layers that a token needs: what sparsities of any kind have in common."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel

from hf_sparse.adapters import Block
from hf_sparse.adapters.bottleneck import layer_of
from hf_sparse.adapters.copies import in_use
from hf_sparse.adapters.experts import Experts
from hf_sparse.adapters.roles import linear_size
from hf_sparse.modules import sparse_part


def in_layers(model: PreTrainedModel, blocks: Sequence[Block]) -> int:
    """How many weights the linear layers have, of attention, MLP and all else, in the layers of ``blocks``.

    Stacked experts are not among them, nor what an adapter adds.
    """
    found = 0
    for layer in dict.fromkeys(layer_of(block.name) for block in blocks):
        for name, one in in_use(model.get_submodule(layer)):
            if "base_layer" in one._modules or "lora_" in name:
                continue
            size = linear_size(one)
            found += 0 if size is None else size[0] * size[1]
    return found


def of_neuron(block: Block) -> int:
    """How many weights one neuron of ``block`` has."""
    return block.hidden_size * (3 if block.form == "gated" else 2)


def of_silent_neuron(block: Block) -> int:
    """How many of them a token does not need for which the neuron is silent; of a patched ``block``.

    Those of the down projection, and of the up projection of a gated block that may be run as one: that its
    gate, or the up projection of a plain one, says which neurons are silent means that it is read.
    """
    part, roles = sparse_part(block.module), block.roles
    whole = block.form == "gated" and not block.stays and not getattr(part, "selects", False)
    if isinstance(roles, Experts):
        whole = whole and roles.is_plain_formula
    return block.hidden_size * (2 if whole else 1)
