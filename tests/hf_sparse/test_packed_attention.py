"""Attention of a new token: what transformers' ``"sdpa"`` computes, and whose it is."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import StoppingCriteria, StoppingCriteriaList, T5Config, T5ForConditionalGeneration
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


def names_while_generating(model: Any, **options: Any) -> set[str]:
    """The names of its attention in the forwards of a ``generate()``."""
    found: set[str] = set()
    handle = model.register_forward_pre_hook(lambda *_: found.add(model.config._attn_implementation))
    try:
        model.generate(torch.tensor([[5, 7, 9]]), max_new_tokens=4, **options)
    finally:
        handle.remove()
    return found


def prepared(dtype: torch.dtype = torch.bfloat16) -> Any:
    model = tiny("llama").to(dtype)
    hf_sparse.patch(model, "relu")
    hf_sparse.prepare(model)
    return model


def test_a_prepared_model_has_it_while_it_generates() -> None:
    model = prepared()
    assert names_while_generating(model) == {NAME}
    assert model.config._attn_implementation == "sdpa"
    hf_sparse.prepare(model, linears=False)
    assert names_while_generating(model) == {"sdpa"}
    hf_sparse.prepare(model)
    own = copy.deepcopy(model)
    assert names_while_generating(own) == {NAME}
    hf_sparse.unpatch(own)
    assert names_while_generating(own) == {"sdpa"}
    assert names_while_generating(model) == {NAME}
    other = prepared(torch.float32)
    assert names_while_generating(other) == {"sdpa"}
    assert names_while_generating(other.to(torch.float16)) == {NAME}


def test_the_logits_of_a_prepared_model_are_as_near_to_those_in_float32() -> None:
    torch.manual_seed(0)
    stock = tiny("llama").to(torch.bfloat16)
    hf_sparse.patch(stock, "relu")
    model = copy.deepcopy(stock)
    hf_sparse.prepare(model)
    ids = torch.randint(3, 90, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    options = {"attention_mask": mask, "max_new_tokens": 6, "pad_token_id": 0}
    kept = {"output_logits": True, "return_dict_in_generate": True}
    tokens = stock.generate(ids, **options)
    forced = {"prefix_allowed_tokens_fn": lambda row, so_far: [int(tokens[row, len(so_far)])]}

    def logits(one: Any) -> Tensor:
        return torch.stack(one.generate(ids, **options, **kept, **forced).logits).float()

    exact = logits(copy.deepcopy(stock).float())
    error = (logits(stock) - exact).square().mean().sqrt()
    assert 0 < (logits(model) - exact).square().mean().sqrt() <= 1.5 * error


def test_it_ends_with_the_last_of_several_and_with_an_error() -> None:
    model = prepared()

    class Nested(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
            model.generate(torch.tensor([[3]]), max_new_tokens=2)
            assert model.config._attn_implementation == NAME
            if input_ids.shape[1] > 5:
                raise KeyboardInterrupt
            return torch.zeros(len(input_ids), dtype=torch.bool)

    with pytest.raises(KeyboardInterrupt):
        names_while_generating(model, stopping_criteria=StoppingCriteriaList([Nested()]))
    assert model.config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    assert names_while_generating(model) == {"eager"}
    assert model.config._attn_implementation == "eager"


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
