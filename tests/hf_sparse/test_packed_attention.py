"""Attention in a compiled step: what transformers' ``"sdpa"`` computes, and whose it is."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import hf_sparse
from hf_sparse.packed_attention import NAME, pack_attention, packed_attention
from support.composites import composite
from support.every_type import model_types
from support.models import tiny


class Module(nn.Module):
    """What an attention function asks of its module."""

    is_causal = True

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.num_key_value_groups = groups


def mask_of(kind: str, batch: int, heads: int, tokens: int, length: int) -> Tensor | None:
    if kind == "none":
        return None
    shown = torch.rand(batch, heads if kind == "per head" else 1, tokens, length) < 0.7
    shown[..., 0] = True
    return torch.where(shown, torch.randn(shown.shape), -torch.inf) if kind == "added" else shown


@settings(deadline=None)
@given(
    batch=st.integers(1, 3),
    keys=st.integers(1, 3),
    groups=st.integers(1, 4),
    tokens=st.sampled_from([1, 1, 3]),
    length=st.integers(3, 40),
    size=st.sampled_from([8, 16]),
    value_size=st.sampled_from([8, 16]),
    kind=st.sampled_from(["none", "shown", "added", "per head"]),
    scaling=st.sampled_from([None, 0.3]),
    bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_it_is_sdpa(batch, keys, groups, tokens, length, size, value_size, kind, scaling, bias, seed) -> None:
    torch.manual_seed(seed)
    heads = keys * groups
    query, key = torch.randn(batch, heads, tokens, size), torch.randn(batch, keys, length, size)
    value = torch.randn(batch, length, keys, value_size).transpose(1, 2)  # of any strides
    mask = mask_of(kind, batch, heads, tokens, length)
    own = {"position_bias": torch.randn(1, heads, tokens, length)} if bias else {}
    if bias and mask is not None and mask.dtype != torch.bool:
        mask = mask.clamp(min=-1e4)
    arguments = Module(groups), query, key, value, mask
    expected, _ = sdpa_attention_forward(*arguments, scaling=scaling, **own)
    found, weights = packed_attention(*arguments, scaling=scaling, **own)
    assert weights is None
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected)


def test_what_it_cannot_do_is_the_error_of_sdpa() -> None:
    query, key = torch.randn(1, 4, 1, 8), torch.randn(1, 2, 5, 8)
    with pytest.raises(ValueError, match="does not support `softcap`"):
        packed_attention(Module(2), query, key, key, None, softcap=30.0)


def test_a_compiled_step_has_it_until_it_ends() -> None:
    model = tiny("llama")
    hf_sparse.patch(model, "relu")
    for end in (hf_sparse.prepare, hf_sparse.unpatch):
        assert model.config._attn_implementation == "sdpa"
        hf_sparse.prepare(model, compile=True)
        assert model.config._attn_implementation == NAME
        assert model.model.layers[0].self_attn.config._attn_implementation == NAME
        end(model)
    assert model.config._attn_implementation == "sdpa"


def test_what_somebody_has_chosen_stays() -> None:
    model = tiny("llama")
    hf_sparse.patch(model, "relu")
    model.set_attn_implementation("eager")
    hf_sparse.prepare(model, compile=True)
    assert model.config._attn_implementation == "eager"
    model.set_attn_implementation("sdpa")
    hf_sparse.prepare(model, compile=True)
    model.set_attn_implementation("eager")
    hf_sparse.unpatch(model)
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("part", ["vision_config", "text_config"])
def test_a_composite_with_a_choice_of_its_own_is_left(part) -> None:
    model = composite("gemma3")
    hf_sparse.patch(model, "relu")
    model.set_attn_implementation({part: "eager"})
    before = {name: getattr(model.config, name)._attn_implementation for name in model.config.sub_configs}
    hf_sparse.prepare(model, compile=True)
    after = {name: getattr(model.config, name)._attn_implementation for name in model.config.sub_configs}
    assert before == after
    assert NAME not in after.values()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["glm_moe_dsa", "deepseek_v32", "gemma4_text"])
def test_a_model_that_asks_for_it_by_name_keeps_sdpa(name) -> None:
    model = model_types()[name].build()
    hf_sparse.patch(model, "relu")
    hf_sparse.prepare(model)
    ids = torch.randint(3, 60, (1, 24))
    with torch.no_grad():
        expected = model(ids).logits
        if model.can_generate() and model._can_compile_fullgraph:
            hf_sparse.prepare(model, compile=True)
        else:
            pack_attention(model)
        assert torch.equal(model(ids).logits, expected)
    assert model.config._attn_implementation == "sdpa"


def test_no_part_of_a_model_keeps_it() -> None:
    config = T5Config(num_layers=1, d_model=16, d_ff=32, num_heads=2, d_kv=8, vocab_size=99)
    model = T5ForConditionalGeneration(config)
    hf_sparse.patch(model, "relu")
    hf_sparse.prepare(model, compile=True)
    hf_sparse.unpatch(model)
    configs = [vars(module)["config"] for module in model.modules() if "config" in vars(module)]
    assert NAME not in {config._attn_implementation for config in configs}


def test_it_is_not_saved(tmp_path) -> None:
    model = tiny("llama")
    hf_sparse.patch(model, "relu")
    hf_sparse.prepare(model, compile=True)
    model.save_pretrained(tmp_path)
    assert NAME not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    assert type(model).from_pretrained(tmp_path).config._attn_implementation == "sdpa"
