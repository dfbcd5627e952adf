"""ReLU after norms: on the right ones, and gone without a trace after unpatch."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import hf_sparse
from hf_sparse import SparsityConfig
from hf_sparse.norm_relu import rectified
from support.models import tiny
from support.skips import CountSkips

BOTH = SparsityConfig(activation="relu", norm_relu=True)

NORMS = {
    "llama": ["input_layernorm", "post_attention_layernorm"],
    "qwen3": ["input_layernorm", "post_attention_layernorm"],
    "gemma2": ["input_layernorm", "pre_feedforward_layernorm"],
    "glm4": ["input_layernorm", "post_attention_layernorm"],
    "cohere": ["input_layernorm"],
    "olmo": ["input_layernorm", "post_attention_layernorm"],
    "gpt_neox": ["input_layernorm", "post_attention_layernorm"],
    "gpt2": ["ln_1", "ln_2"],
    "opt": ["final_layer_norm", "self_attn_layer_norm"],
    "bitnet": ["input_layernorm", "post_attention_layernorm"],
    "mixtral": ["input_layernorm", "post_attention_layernorm"],
}
"""By type, the norms of a layer that feed attention and MLP, as one reads them off the sources."""


def with_relu(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if rectified in module._forward_hooks.values()]


def by_hand(model: nn.Module, names: list[str]) -> nn.Module:
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in names and any(part.isdigit() for part in name.split(".")):
            module.register_forward_hook(lambda _, __, output: output.clamp(min=0))
    return model


@pytest.mark.parametrize("kind", NORMS)
def test_the_norms_that_feed_projections_get_one(kind, input_ids) -> None:
    model = tiny(kind)
    reference, keys, stock = copy.deepcopy(model), list(model.state_dict()), model(input_ids).logits
    hf_sparse.patch(reference, "relu")
    expected = by_hand(reference, NORMS[kind])(input_ids).logits
    hf_sparse.patch(model, BOTH)
    assert len(with_relu(model)) == 3 * len(NORMS[kind])
    assert torch.equal(model(input_ids).logits, expected)
    assert list(model.state_dict()) == keys
    hf_sparse.unpatch(model)
    assert torch.equal(model(input_ids).logits, stock)
    assert not any(module._forward_hooks for module in model.modules())


def test_inputs_of_the_mlp_are_sparse_and_not_negative(input_ids) -> None:
    model = tiny("llama")
    hf_sparse.patch(model, BOTH)
    seen: list[Tensor] = []
    for block in hf_sparse.inspect(model).blocks:
        block.watch("x", lambda x, _: seen.append(x))
    model.model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(input_ids)
    assert len(seen) == 4
    for x in seen:
        assert (x >= 0).all()
        assert 0.3 < (x == 0).float().mean() < 0.7


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("olmo2", r"model\.layers\.0\.self_attn gets its input from no norm of its layer alone"),
        ("bert", r"the MLP bert\.encoder\.layer\.0 gets its input from no norm"),
        ("gemma3n_text", r"the forward of model\.layers\.0 \(Gemma3nTextDecoderLayer\) cannot be followed"),
    ],
)
def test_where_no_norm_feeds_them_alone_it_is_refused(kind, why) -> None:
    model = tiny(kind)
    with pytest.raises(hf_sparse.PatchError, match=why):
        hf_sparse.patch(model, BOTH)
    assert hf_sparse.inspect(model).config is None
    assert not with_relu(model)


class Shared(LlamaDecoderLayer):
    """Its residual is what the norm gives."""

    def forward(self, hidden_states, **kwargs):
        x = self.input_layernorm(hidden_states)
        x = x + self.self_attn(hidden_states=x, **kwargs)[0]
        return x + self.mlp(self.post_attention_layernorm(x))


class Scaled(LlamaDecoderLayer):
    """Attention gets something else than what the norm gives."""

    def forward(self, hidden_states, **kwargs):
        x = (
            hidden_states
            + self.self_attn(hidden_states=0.5 * self.input_layernorm(hidden_states), **kwargs)[0]
        )
        return x + self.mlp(self.post_attention_layernorm(x))


@pytest.mark.parametrize("odd", [Shared, Scaled])
def test_a_norm_that_feeds_something_else_gets_none(odd) -> None:
    model = tiny("llama")
    model.model.layers[1].__class__ = odd
    with pytest.raises(
        hf_sparse.PatchError, match=r"model\.layers\.1\.self_attn gets its input from no norm"
    ):
        hf_sparse.patch(model, BOTH)
    assert not with_relu(model)


def test_a_norm_in_a_wrapping_that_is_not_known_is_refused() -> None:
    model = tiny("llama")
    layer = model.model.layers[2]
    layer.input_layernorm = nn.Sequential(layer.input_layernorm, nn.Dropout(0.0))
    with pytest.raises(hf_sparse.PatchError, match=r"the forward of model\.layers\.2 .* cannot be followed"):
        hf_sparse.patch(model, BOTH)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "mixtral"])
def test_what_is_saved_comes_back(kind, input_ids, tmp_path) -> None:
    model = tiny(kind)
    stock = model(input_ids).logits
    hf_sparse.patch(model, BOTH)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(input_ids).logits, model(input_ids).logits)
    assert hf_sparse.inspect(loaded).config == BOTH
    assert hf_sparse.inspect(loaded).stock_name is None
    hf_sparse.unpatch(loaded)
    assert torch.equal(loaded(input_ids).logits, stock)


def test_only_layers_that_are_patched_get_one() -> None:
    model = tiny("llama")
    hf_sparse.patch(model, BOTH.changed(layers=(1,)))
    assert with_relu(model) == [f"model.layers.1.{name}" for name in NORMS["llama"]]
    hf_sparse.patch(model, BOTH.changed(layers=(0, 2)))
    assert {name.split(".")[2] for name in with_relu(model)} == {"0", "2"}
    hf_sparse.patch(model, "relu")
    assert not with_relu(model)


def test_a_layer_is_patched_whole() -> None:
    model = tiny("qwen2_moe", shared_expert_intermediate_size=24, moe_intermediate_size=24)
    blocks = hf_sparse.inspect(model).blocks
    assert len(blocks) == 6  # experts and a shared one, in each layer
    with pytest.raises(
        hf_sparse.PatchError, match=r"whole layers, and of the MLP blocks in model\.layers\.0 one"
    ):
        hf_sparse.patch(model, BOTH.changed(layers=(0,)))
    hf_sparse.patch(model, BOTH)
    assert len(with_relu(model)) == 6


def test_generation_that_skips_gives_the_dense_tokens(input_ids) -> None:
    model = tiny("llama")
    hf_sparse.patch(model, BOTH)
    with hf_sparse.backend("dense"):
        expected = model.generate(input_ids[:1], max_new_tokens=6, do_sample=False)
    with hf_sparse.backend("torch"), CountSkips() as skips:
        assert torch.equal(model.generate(input_ids[:1], max_new_tokens=6, do_sample=False), expected)
    assert skips.count >= 6 * 3


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant, input_ids) -> None:
    model = tiny("llama")
    hf_sparse.patch(model, BOTH)
    grads = []
    for checkpointing in (False, True):
        model.train().zero_grad()
        if checkpointing:
            model.activation_checkpointing_enable(
                activation_checkpointing_kwargs={"use_reentrant": reentrant}
            )
            model.enable_input_require_grads()
        model(input_ids, labels=input_ids, use_cache=False).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.slow
def test_one_graph_has_it(input_ids) -> None:
    torch.compiler.reset()
    model = tiny("llama")
    hf_sparse.patch(model, BOTH)
    expected = model(input_ids, use_cache=False).logits.detach()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(input_ids, use_cache=False).logits, expected)


def test_a_copy_has_its_own() -> None:
    model = tiny("llama")
    hf_sparse.patch(model, BOTH)
    other = copy.deepcopy(model)
    hf_sparse.unpatch(model)
    assert len(with_relu(other)) == 6
    assert hf_sparse.inspect(other).config == BOTH


def test_norms_that_peft_keeps_copies_of_get_one_each(input_ids) -> None:
    model = tiny("llama")
    reference = copy.deepcopy(model)
    saved = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["input_layernorm"])
    wrapped = get_peft_model(model, saved)
    hf_sparse.patch(wrapped, BOTH)
    first = "model.layers.0.input_layernorm"
    names = [name for name in with_relu(wrapped.get_base_model()) if name.startswith(first)]
    assert names == [f"{first}.original_module", f"{first}.modules_to_save.default"]
    hf_sparse.patch(reference, BOTH)
    torch.testing.assert_close(wrapped(input_ids).logits, reference(input_ids).logits)
    merged = wrapped.merge_and_unload()
    assert len(with_relu(merged)) == 6
    assert hf_sparse.inspect(merged).config == BOTH


def test_a_norm_without_it_is_not_saved_as_if_it_had_one(tmp_path) -> None:
    model = tiny("llama")
    hf_sparse.patch(model, BOTH)
    model.model.layers[1].input_layernorm._forward_hooks.clear()
    with pytest.raises(hf_sparse.PatchError, match="a ReLU after 6 norms, and 5 of them and 0 other"):
        model.save_pretrained(tmp_path)


def test_errors_name_the_field_and_the_value() -> None:
    with pytest.raises(ValueError, match="norm_relu=False is not known: true is all"):
        SparsityConfig(norm_relu=False)
    with pytest.raises(ValueError, match="unknown fields in norm_relu: at"):
        SparsityConfig(norm_relu={"at": "attention"})
