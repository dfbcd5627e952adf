"""A model with a head, built from a patched config: what it adds to its inner model, or changes there."""

from __future__ import annotations

import pytest
from torch import nn
from transformers import LlamaModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP, LlamaPreTrainedModel

import hf_sparse
from hf_sparse.modules import SparseMLP
from support.twins import IDS, stock


class WithHead(LlamaPreTrainedModel):
    """As the stock class builds it, in that order."""

    def __init__(self, config):
        super().__init__(config)
        self.model = LlamaModel(config)
        self.change(config)
        self.post_init()

    def change(self, config):
        pass

    def forward(self, ids):
        return self.model(ids).last_hidden_state


class WithAnotherMLP(WithHead):
    def change(self, config):
        self.model.layers[1].mlp = LlamaMLP(config)


class WithAnotherLayer(WithHead):
    def change(self, config):
        self.model.layers.append(LlamaDecoderLayer(config, 2))


class WithLayersOfItsOwn(WithHead):
    def change(self, config):
        self.own = nn.ModuleList([LlamaMLP(config)])

    def forward(self, ids):
        return self.own[0](super().forward(ids))


@pytest.mark.parametrize("activation", ["relu", "jsrelu"])  # that a stock config can name, and not
@pytest.mark.parametrize(
    ("kind", "count"), [(WithHead, 2), (WithAnotherMLP, 2), (WithAnotherLayer, 3), (WithLayersOfItsOwn, 3)]
)
def test_every_block_is_patched(kind, count, activation) -> None:
    model = stock("llama")
    hf_sparse.patch(model, activation)
    built = kind(model.config)
    mlps = [module for module in built.modules() if isinstance(module, LlamaMLP | SparseMLP)]
    assert [type(mlp.act_fn) for mlp in mlps] == [type(model.model.layers[0].mlp.activation)] * count
    assert all(isinstance(mlp, SparseMLP) for mlp in mlps)
    assert len(hf_sparse.inspect(built).blocks) == count
    assert built(IDS).isfinite().all()


@pytest.mark.parametrize(("kind", "count"), [(WithAnotherLayer, 3), (WithLayersOfItsOwn, 3)])
def test_blocks_that_the_config_does_not_count_are_refused(kind, count) -> None:
    """Where it tells blocks apart by their number."""
    model = stock("llama")
    hf_sparse.patch(model, "fatrelu", threshold=(0.1, 0.2))
    assert len(hf_sparse.inspect(WithHead(model.config)).blocks) == 2
    with pytest.raises(ValueError, match=f"blocks=2 is not the number.*which is {count}"):
        kind(model.config)
