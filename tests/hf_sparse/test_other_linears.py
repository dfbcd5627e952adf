"""Linear layers of other classes than ``nn.Linear``: read where they compute the same, else called."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import hf_sparse
from support.every_type import model_types
from support.skips import CountSkips


class Noisy(nn.Linear):
    """A subclass of somebody else."""

    def forward(self, x):
        return super().forward(x) + 1


class Same(nn.Linear):
    """Computes the same, which nobody promises for tomorrow."""

    def forward(self, x):
        return x @ self.weight.t() + self.bias


@pytest.mark.parametrize("cls", [Noisy, Same])
@pytest.mark.parametrize("name", ["gate_proj", "down_proj"])
def test_those_of_another_tool_are_called(tiny_model, input_ids, cls, name) -> None:
    models = [tiny_model("llama", mlp_bias=True)]
    models.append(copy.deepcopy(models[0]))
    hf_sparse.patch(models[0], "relu")
    for layer in models[1].model.layers:
        layer.mlp.act_fn = nn.ReLU()
    for model in models:
        for layer in model.model.layers:
            other = cls(*getattr(layer.mlp, name).weight.shape[::-1])
            other.load_state_dict(getattr(layer.mlp, name).state_dict())
            setattr(layer.mlp, name, other)
    with torch.no_grad(), hf_sparse.backend("torch"):
        torch.testing.assert_close(models[0](input_ids).logits, models[1](input_ids).logits)


def test_those_of_falcon_are_read(input_ids) -> None:
    """A subclass that computes the same in other words."""
    model, input_ids = model_types()["falcon"].build(), input_ids % 60
    hf_sparse.patch(model, "relu")
    expected = model(input_ids).logits.detach()
    with torch.no_grad(), hf_sparse.backend("torch"), CountSkips() as skips:
        torch.testing.assert_close(model(input_ids).logits, expected, rtol=1e-4, atol=1e-5)
    assert skips.count == len(hf_sparse.inspect(model).blocks)


def test_a_forward_of_falcon_that_somebody_replaces_is_called(input_ids, monkeypatch) -> None:
    model, input_ids = model_types()["falcon"].build(), input_ids % 60
    hf_sparse.patch(model, "relu")
    cls = type(model.transformer.h[0].mlp.dense_4h_to_h)
    with torch.no_grad(), hf_sparse.backend("torch"):
        before = model(input_ids).logits
        forward = cls.forward
        monkeypatch.setattr(cls, "forward", lambda self, x: 1.5 * forward(self, x))
        with CountSkips() as skips:
            assert not torch.allclose(model(input_ids).logits, before, atol=1e-3)
        assert not skips.count
