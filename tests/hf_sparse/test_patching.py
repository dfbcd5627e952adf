"""patch and unpatch on stock models: what is computed, what is kept, what comes back."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook

import hf_sparse
from hf_sparse import PatchError, SparsityConfig
from hf_sparse.adapters import find_blocks
from support.activations import FIELDS, GATED_OR_PLAIN, fits, own_field
from support.compiler import CPP
from support.skips import CountSkips
from triton_ops.activations import TABLE


def config_for(activation: str, **fields) -> SparsityConfig:
    return SparsityConfig.read(activation, **FIELDS[activation], **fields)


def plain_mlp(block, activation: str, x: Tensor) -> Tensor:
    """The same function in plain PyTorch, from the block's weights."""
    *first, down = block.weights()
    row = TABLE[activation]
    parameter = sum(FIELDS[activation].values())

    def f(p):
        return row.value(p, parameter)

    h = f(F.linear(x, *first[0]))
    if block.form == "gated":
        up = F.linear(x, *first[1])
        h = h * (up.clamp(min=0) if row.relu_up else up)
    return F.linear(h, *down)


def test_original_activation_is_bit_identical(tiny_model, any_type, input_ids) -> None:
    model = tiny_model(any_type)
    for train in (False, True):
        model.train(train)
        torch.manual_seed(0)  # dropout
        before = model(input_ids).logits
        hf_sparse.patch(model, "original")
        torch.manual_seed(0)
        assert torch.equal(model(input_ids).logits, before)
        hf_sparse.unpatch(model)


@pytest.mark.parametrize("activation", TABLE)
def test_substituted_activation_equals_plain_pytorch(tiny_model, layered_type, activation) -> None:
    model = tiny_model(layered_type)
    if TABLE[activation].relu_up and find_blocks(model)[0][0].form == "plain":
        with pytest.raises(PatchError, match="needs a gated MLP"):
            hf_sparse.patch(model, config_for(activation))
        return
    if not fits(activation, find_blocks(model)[0][0].activation):
        with pytest.raises(PatchError, match=r"CATS is for|keeps the large"):
            hf_sparse.patch(model, config_for(activation))
        return
    report = hf_sparse.patch(model, config_for(activation))
    assert len(report.blocks) == 3
    x = torch.randn(2, 5, 32)
    for block in report.blocks:
        torch.testing.assert_close(block.module(x), plain_mlp(block, activation, x))


@pytest.mark.parametrize(
    ("family", "activation"),
    [("llama" if gated else "gpt_neox", activation) for activation, gated in GATED_OR_PLAIN],
)
@pytest.mark.parametrize("backend", ["torch", CPP])
def test_generation_that_skips_gives_the_dense_tokens(tiny_model, family, activation, backend) -> None:
    model = tiny_model(family, **own_field(activation))
    hf_sparse.patch(model, config_for(activation))
    prompt = torch.randint(3, 128, (1, 6))
    tokens, skips = {}, {}
    for name in ("dense", backend):
        with hf_sparse.backend(name), CountSkips() as counter:
            tokens[name] = model.generate(
                prompt, max_new_tokens=8, min_new_tokens=8, do_sample=False, use_cache=True
            )
        skips[name] = counter.count
    assert torch.equal(tokens["dense"], tokens[backend])
    assert skips == {"dense": 0, backend: 8 * 3}  # every step, every block


def test_gradients_equal_plain_pytorch(tiny_model) -> None:
    model = tiny_model("llama")
    (block, *_) = hf_sparse.patch(model, "jsrelu").blocks
    x = torch.randn(2, 5, 32, requires_grad=True)
    weights = [*(block.module.get_submodule(name).weight for name in block.roles.linears(1, 1)), x]
    ours = torch.autograd.grad(block.module(x).square().sum(), weights)
    theirs = torch.autograd.grad(plain_mlp(block, "jsrelu", x).square().sum(), weights)
    torch.testing.assert_close(ours, theirs)


def test_names_and_parameters_stay(tiny_model, any_type) -> None:
    model = tiny_model(any_type)
    before = dict(model.named_parameters())
    names = [name for name, _ in model.named_modules()]
    hf_sparse.patch(model, "jsrelu")
    assert dict(model.named_parameters()).keys() == before.keys()
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert [name for name, _ in model.named_modules()] == names
    assert list(model.state_dict()) == list(tiny_model(any_type).state_dict())


def test_unpatch_restores_the_very_modules(tiny_model, any_type, input_ids) -> None:
    model = tiny_model(any_type)
    modules, config = dict(model.named_modules()), model.config.to_dict()
    before = model(input_ids).logits
    hf_sparse.patch(model, "relu2")
    assert not torch.equal(model(input_ids).logits, before) or any_type in ("nemotron", "persimmon", "bitnet")
    with torch.no_grad(), hf_sparse.backend("torch"):  # changes the strides of the down projections
        model(input_ids)
    hf_sparse.unpatch(model)
    after = dict(model.named_modules())
    assert after.keys() == modules.keys()
    assert all(after[name] is module for name, module in modules.items())
    assert all(p.is_contiguous() for p in model.parameters())
    assert torch.equal(model(input_ids).logits, before)
    assert model.config.to_dict() == config


def test_patching_again_starts_from_the_stock_blocks(tiny_model, input_ids) -> None:
    model = tiny_model("llama")
    stock = copy.deepcopy(model)
    hf_sparse.patch(model, "relu")
    hf_sparse.patch(model, SparsityConfig(activation="jsrelu", layers=(1,)))
    hf_sparse.patch(stock, SparsityConfig(activation="jsrelu", layers=(1,)))
    assert torch.equal(model(input_ids).logits, stock(input_ids).logits)
    assert model.config.to_dict() == stock.config.to_dict()


def test_another_model_of_the_same_config_object_is_untouched(tiny_model, input_ids) -> None:
    first = tiny_model("llama")
    second = type(first)(first.config).eval()
    before = second(input_ids).logits
    hf_sparse.patch(first, "relu")
    assert torch.equal(second(input_ids).logits, before)
    assert hf_sparse.inspect(second).config is None


def test_layers_and_their_thresholds(tiny_model) -> None:
    model = tiny_model("llama")
    config = SparsityConfig.read("fatrelu", threshold=(0.1, 0.3), layers=(0, 2))
    report = hf_sparse.patch(model, config)
    assert [b.name for b in report.blocks] == ["model.layers.0.mlp", "model.layers.2.mlp"]
    assert [b.activation.threshold for b in report.blocks] == [0.1, 0.3]
    assert type(model.model.layers[1].mlp).__name__ == "LlamaMLP"


def test_patching_an_inner_model_is_a_patch_of_the_outer(tiny_model, input_ids, tmp_path) -> None:
    model = tiny_model("llama")
    hf_sparse.patch(model.model, "jsrelu")
    expected = model(input_ids).logits
    model.save_pretrained(tmp_path)
    assert torch.equal(type(model).from_pretrained(tmp_path)(input_ids).logits, expected)
    hf_sparse.unpatch(model)
    assert not hf_sparse.inspect(model).config


def test_decoding_in_inference_mode_leaves_a_model_that_trains(tiny_model, input_ids) -> None:
    model = tiny_model("llama")
    hf_sparse.patch(model, "relu")
    with torch.inference_mode(), hf_sparse.backend("torch"):
        model(input_ids)
    model.train()(input_ids, labels=input_ids).loss.backward()
    assert model.model.layers[0].mlp.down_proj.weight.grad.abs().sum() > 0


def test_a_hook_on_the_activation_is_called_when_decoding(tiny_model) -> None:
    model = tiny_model("llama")
    (block, *_) = hf_sparse.patch(model, "relu").blocks
    block.activation.register_forward_hook(lambda module, args, out: out * 0)
    with torch.no_grad(), hf_sparse.backend("torch"), CountSkips() as skips:
        assert not block.module(torch.randn(1, 32)).any()
    assert skips.count == 0


def test_a_hook_on_all_modules_sees_those_of_a_block_when_decoding(tiny_model) -> None:
    model = tiny_model("llama")
    (block, *_) = hf_sparse.patch(model, "relu").blocks
    seen: list[str] = []
    handle = register_module_forward_hook(lambda module, args, out: seen.append(type(module).__name__))
    try:
        with torch.no_grad(), hf_sparse.backend("torch"), CountSkips() as skips:
            block.module(torch.randn(1, 32))
    finally:
        handle.remove()
    assert skips.count == 0
    assert sorted(seen) == ["Linear", "Linear", "Linear", "ReLU", "SparseGatedMLP"]


def test_a_linear_layer_without_a_bias_entry_is_called(tiny_model) -> None:
    model = tiny_model("llama")
    (block, *_) = hf_sparse.patch(model, "relu").blocks
    x = torch.randn(1, 32)
    with torch.no_grad(), hf_sparse.backend("torch"):
        expected = block.module(x)
        del block.module.gate_proj.bias
        block.module.gate_proj.bias = None
        torch.testing.assert_close(block.module(x), expected)


def test_forward_on_the_meta_device(tiny_model) -> None:
    model = tiny_model("llama").to("meta")
    hf_sparse.patch(model, "relu")
    with torch.no_grad():
        assert model(torch.ones(1, 3, dtype=torch.int64, device="meta")).logits.shape == (1, 3, 128)


def test_deepcopy_of_a_patched_model_is_independent(tiny_model, input_ids) -> None:
    model = tiny_model("llama")
    hf_sparse.patch(model, "relu")
    expected = model(input_ids).logits
    twin = copy.deepcopy(model)
    with torch.no_grad():
        model.model.layers[0].mlp.gate_proj.weight.zero_()
    assert torch.equal(twin(input_ids).logits, expected)
    hf_sparse.unpatch(twin)
    assert twin.model.layers[0].mlp.gate_proj.weight.abs().sum() > 0


def test_hooks_on_a_block_survive_patch_and_unpatch(tiny_model, input_ids) -> None:
    model = tiny_model("llama")
    calls: list[str] = []
    handle = model.model.layers[0].mlp.register_forward_hook(lambda m, *_: calls.append(type(m).__name__))
    hf_sparse.patch(model, "relu")
    model(input_ids)
    hf_sparse.unpatch(model)
    model(input_ids)
    handle.remove()
    model(input_ids)
    assert calls == ["SparseGatedMLP", "LlamaMLP"]


class TestMix:
    def test_zero_is_the_original_and_one_the_new(self, tiny_model, input_ids) -> None:
        for activation in ("relu", "drelu"):
            model = tiny_model("llama")
            dense = model(input_ids).logits
            hf_sparse.patch(model, SparsityConfig.read(activation, mix=0.0))
            torch.testing.assert_close(model(input_ids).logits, dense)
            hf_sparse.set_mix(model, 1.0)
            mixed = model(input_ids).logits
            hf_sparse.unpatch(model)
            hf_sparse.patch(model, activation)
            assert torch.equal(model(input_ids).logits, mixed)

    def test_between_is_linear_in_the_activation(self, tiny_model) -> None:
        model = tiny_model("phi")
        (block, *_) = hf_sparse.patch(model, SparsityConfig.read("jsrelu", mix=0.25)).blocks
        p = torch.randn(50)
        expected = 0.75 * F.gelu(p, approximate="tanh") + 0.25 * TABLE["jsrelu"].value(p, 0.0)
        torch.testing.assert_close(block.activation(p), expected)

    def test_config_says_what_the_model_computes(self, tiny_model) -> None:
        model = tiny_model("llama")
        hf_sparse.patch(model, SparsityConfig.read("relu", mix=0.0))
        assert model.config.hidden_act == "hf_sparse"
        hf_sparse.set_mix(model, 0.5)
        assert (model.config.hidden_act, model.config.hf_sparse["activation"]) == (
            "hf_sparse",
            {"name": "relu", "mix": 0.5},
        )
        hf_sparse.set_mix(model, 1.0)
        assert (model.config.hidden_act, model.config.hf_sparse["activation"]) == ("relu", {"name": "relu"})

    def test_needs_a_patched_model_and_a_share(self, tiny_model) -> None:
        model = tiny_model("llama")
        with pytest.raises(PatchError, match="not patched"):
            hf_sparse.set_mix(model, 0.5)
        hf_sparse.patch(model, "relu")
        with pytest.raises(ValueError, match=r"mix=2\.0"):
            hf_sparse.set_mix(model, 2.0)


class TestErrors:
    """Each leaves the model as it was."""

    @pytest.fixture
    def unchanged(self, tiny_model, input_ids):
        model = tiny_model("gpt_neox")
        modules, config = dict(model.named_modules()), model.config
        before, text = model(input_ids).logits, config.to_dict()
        yield model
        assert dict(model.named_modules()) == modules
        assert model.config is config
        assert config.to_dict() == text
        assert torch.equal(model(input_ids).logits, before)

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            (SparsityConfig(layers=(0, 3)), "names block 3, but GPTNeoXForCausalLM has blocks 0 to 2"),
            (
                SparsityConfig.read("fatrelu", threshold=[0.1]),
                "has values for 1 blocks, but 3 are",
            ),
            (SparsityConfig(activation="drelu"), "needs a gated MLP"),
        ],
    )
    def test_config_that_does_not_fit(self, unchanged, config, message) -> None:
        with pytest.raises(PatchError, match=message):
            hf_sparse.patch(unchanged, config)

    def test_unknown_activation(self, unchanged) -> None:
        with pytest.raises(ValueError, match=r"activation\.name='swiglu' is not known; choose one of"):
            hf_sparse.patch(unchanged, "swiglu")

    @pytest.mark.parametrize("config", [None, torch.nn.ReLU(), 3])
    def test_something_else_than_a_config(self, unchanged, config) -> None:
        with pytest.raises(ValueError, match="neither a SparsityConfig nor the name of an activation"):
            hf_sparse.patch(unchanged, config)

    def test_misspelt_field(self, unchanged) -> None:
        with pytest.raises(ValueError, match=r"unknown fields .*: treshold"):
            hf_sparse.patch(unchanged, "fatrelu", treshold=0.1)

    def test_fields_beside_a_config(self, unchanged) -> None:
        with pytest.raises(ValueError, match="give mix in the SparsityConfig"):
            hf_sparse.patch(unchanged, SparsityConfig(), mix=0.5)

    def test_unpatching_a_stock_model(self, unchanged) -> None:
        with pytest.raises(PatchError, match="is not patched"):
            hf_sparse.unpatch(unchanged)

    def test_forward_replaced_by_another_tool(self, tiny_model) -> None:
        model = tiny_model("llama")
        mlp = model.model.layers[1].mlp
        mlp.forward = lambda x: x
        with pytest.raises(PatchError, match="was replaced by"):
            hf_sparse.patch(model, "relu")
        assert model.model.layers[1].mlp is mlp

    def test_unknown_architecture_names_what_was_found(self, tiny_model) -> None:
        model = tiny_model("mamba", state_size=4)
        with pytest.raises(PatchError, match=r"MambaMixer at backbone\.layers\.0"):
            hf_sparse.patch(model, "relu")

    def test_not_a_transformers_model(self) -> None:
        with pytest.raises(PatchError, match="expected a transformers model"):
            hf_sparse.patch(torch.nn.Linear(2, 2), "relu")


def test_inspect_changes_nothing_and_tells_the_state(tiny_model) -> None:
    model = tiny_model("llama")
    before = dict(model.named_modules())
    text = str(hf_sparse.inspect(model))
    assert dict(model.named_modules()) == before
    assert "3 x LlamaMLP (gated), 32 -> 88 -> 32" in text
    hf_sparse.patch(model, "fatrelu", threshold=0.5)
    text = str(hf_sparse.inspect(model))
    assert "silu -> fatrelu (threshold 0.5)" in text
    assert "import hf_sparse" in text
