"""Adapters and gates have the structure of a plain MLP, and are left as they are."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AXK2Config, XmodConfig

import hf_sparse
from hf_sparse import PatchError
from hf_sparse.adapters import find_blocks
from hf_sparse.modules import SparseBlock

IDS = torch.arange(3, 21).reshape(2, 9)


def axk2():
    """Its norms are gated by two linear layers of low rank with nn.SiLU between them."""
    config = AXK2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        gated_norm_rank=4,
        n_group=1,
        topk_group=1,
        index_n_heads=2,
        index_head_dim=16,
        index_topk=8,
        max_position_embeddings=64,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def xmod():
    """After each MLP, which is in two modules, an adapter for each language."""
    config = XmodConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        languages=["en_XX", "de_DE"],
        default_language="en_XX",
        max_position_embeddings=64,
        is_decoder=True,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def sparse_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, SparseBlock)]


def test_the_gates_of_gated_norms_are_no_mlps(tmp_path) -> None:
    model = axk2()
    dense = model(IDS).logits
    report = hf_sparse.patch(model, "relu")
    names = sparse_names(model)
    assert "model.layers.0.mlp" in names
    assert not any("layernorm" in name for name in names)
    gates = [one for one in report.skipped if one.class_name == "AXK2GateMLP"]
    assert {one.name for one in gates} == {
        "model.layers.0.input_layernorm.mlp",
        "model.layers.1.input_layernorm.mlp",
        "model.layers.1.post_attention_layernorm.mlp",
    }
    assert "wider network in its layer" in gates[0].reason
    expected = model(IDS).logits
    assert not torch.equal(expected, dense)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert sparse_names(loaded) == names
    assert torch.equal(loaded(IDS).logits, expected)
    hf_sparse.unpatch(loaded)
    assert torch.equal(loaded(IDS).logits, dense)


def test_language_adapters_are_no_mlps() -> None:
    model = xmod()
    blocks, skipped = find_blocks(model)
    assert not any("adapter_modules" in block.name for block in blocks)
    assert sum("adapter_modules" in one.name for one in skipped) == 4
    dense = model(IDS).logits
    if not blocks:
        with pytest.raises(PatchError, match=r"XmodAdapter at .*: it is an adapter or a gate"):
            hf_sparse.patch(model, "relu")
        assert torch.equal(model(IDS).logits, dense)


def test_an_activation_with_parameters_is_not_taken_for_one_that_is_written_in(tiny_model) -> None:
    model = tiny_model("apertus")
    assert find_blocks(model)[0] == []
    with pytest.raises(PatchError, match="no MLP block of a known shape in ApertusForCausalLM"):
        hf_sparse.patch(model, "relu")


def test_a_narrow_mlp_that_is_alone_in_its_layer_is_patched(tiny_model) -> None:
    model = tiny_model("gpt_neox", intermediate_size=16)
    assert [block.intermediate_size for block in hf_sparse.patch(model, "relu").blocks] == [16] * 3


def test_a_narrow_gated_mlp_is_patched_beside_a_wider_one(tiny_model) -> None:
    """Shared experts are narrower than their hidden size, and stand beside stacked ones."""
    model = tiny_model("llama", intermediate_size=16)
    model.model.layers[0].extra = tiny_model("llama", intermediate_size=64).model.layers[0].mlp
    assert len(find_blocks(model)[0]) == 4
