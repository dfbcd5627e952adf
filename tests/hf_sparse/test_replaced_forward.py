"""Another tool puts its forward in the place of a patched block's: never a model that silently is another."""

from __future__ import annotations

import types

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaMLP

import hf_sparse
from support.models import tiny
from support.peek import sparse_blocks

IDS = torch.arange(3, 20)[None]


def swiglu(self, x: torch.Tensor) -> torch.Tensor:
    return self.down_proj(torch.nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


def patched():
    model = tiny("llama")
    hf_sparse.patch(model, "relu")
    return model


def bind(block) -> None:
    block.forward = types.MethodType(swiglu, block)


def bind_quietly(block) -> None:
    """As Liger does for a model that is there."""
    vars(block)["forward"] = swiglu.__get__(block, type(block))


@pytest.mark.parametrize("replace", [bind, bind_quietly])
@pytest.mark.parametrize("grad", [True, False])
def test_it_is_refused_when_the_model_runs_and_told_when_looked_at_or_saved(replace, grad, tmp_path) -> None:
    model = patched()
    expected = model(IDS).logits
    for block in sparse_blocks(model):
        replace(block)
    with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match=r"replaced by .*swiglu"):
        model(IDS)
    with pytest.raises(RuntimeError, match="swiglu"):
        hf_sparse.measure(model, [{"input_ids": IDS}])
    assert "WARNING: the forward of 3 blocks was replaced by" in str(hf_sparse.inspect(model))
    with pytest.warns(UserWarning, match="swiglu"):
        model.save_pretrained(tmp_path)
    with pytest.raises(hf_sparse.PatchError, match="swiglu"):
        hf_sparse.patch(model, "relu2")
    for block in sparse_blocks(model):
        del block.forward
    assert torch.equal(model(IDS).logits, expected)


def test_a_wrapper_that_calls_the_own_forward_is_welcome() -> None:
    model = patched()
    expected = model(IDS).logits
    for block in sparse_blocks(model):
        block.forward = lambda x, own=block.forward: own(x)
    assert torch.equal(model(IDS).logits, expected)
    with torch.no_grad(), hf_sparse.backend("torch"):
        model(IDS[:, :1])


def test_a_forward_replaced_in_the_stock_class_changes_nothing(monkeypatch) -> None:
    """As Liger does for the models to come: the block runs the function that was recognised."""
    model = patched()
    expected = model(IDS).logits
    monkeypatch.setattr(LlamaMLP, "forward", swiglu)
    assert torch.equal(model(IDS).logits, expected)
    with torch.no_grad(), hf_sparse.backend("torch"):
        model(IDS)


def test_a_class_that_computes_something_else_is_not_patched(monkeypatch) -> None:
    monkeypatch.setattr(LlamaMLP, "forward", swiglu)
    with pytest.raises(hf_sparse.PatchError, match="no MLP block of a known shape"):
        patched()


def bypass(self, x, **kwargs):
    """A decoder layer that has its MLP written in."""
    return x + swiglu(self.mlp, x)


def test_a_layer_that_may_leave_its_block_out_is_told(tmp_path) -> None:
    model = patched()
    for layer in model.model.layers[:2]:
        layer.forward = types.MethodType(bypass, layer)
    assert "WARNING: the forward of a module around 2 MLP blocks was replaced by" in str(
        hf_sparse.inspect(model)
    )
    with pytest.warns(UserWarning, match=r"a module around MLP blocks was replaced by .*bypass"):
        model.save_pretrained(tmp_path)
    for layer in model.model.layers[:2]:
        del layer.forward
    assert "WARNING" not in str(hf_sparse.inspect(model))
