"""Top-k of h in a block: the formula, its gradient, and that it lives as everything else in a patch does."""

from __future__ import annotations

import copy
import math
from pydoc_data.topics import topics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import hf_sparse
from hf_sparse import SparsityConfig
from hf_sparse.activations import TopKConfig
from hf_sparse.activations.topk import TopK, keep_largest
from hf_sparse.assets import TINY_MODEL
from support.by_hand import logits
from support.models import tiny
from support.skips import CountSkips

K = 9


def config(activation: str = "relu", **fields) -> SparsityConfig:
    return SparsityConfig(activation=activation, topk=fields or {"k": K})


def by_hand(h: Tensor, k: int = K) -> Tensor:
    """The k values of each row that are largest in magnitude, by sorting."""
    rows = [row.abs().argsort(descending=True)[:k] for row in h.flatten(0, -2)]
    kept = torch.zeros_like(h).flatten(0, -2)
    for row, places in zip(kept, rows, strict=True):
        row[places] = 1
    return h * kept.reshape(h.shape)


def selecting(model: nn.Module) -> nn.Module:
    """``model``, a stock one, with the selection put before its down projections by hand."""
    for block in hf_sparse.inspect(model).blocks:
        down = block.module.get_submodule(block.roles.down)
        down.register_forward_pre_hook(lambda _, args: (by_hand(args[0]),))
    return model


def test_the_largest_in_magnitude_are_kept() -> None:
    h = torch.tensor([[1.0, -5.0, 0.0, 3.0, -2.0], [0.0, 0.0, 0.0, 0.0, 0.5]])
    expected = torch.tensor([[0.0, -5.0, 0.0, 3.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.5]])
    assert torch.equal(keep_largest(h, 2), expected)
    assert torch.equal(keep_largest(h, 2, straight_through=True), expected)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-8, 8, width=16), min_size=1, max_size=12), st.data())
def test_nothing_that_is_dropped_is_larger_than_what_is_kept(values, data) -> None:
    k = data.draw(st.integers(1, len(values)))
    h = torch.tensor(values, dtype=data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])))
    z = keep_largest(h, k)
    dropped = h[(z == 0) & (h != 0)].abs()
    assert torch.equal(z[z != 0], h[z != 0])
    assert z.count_nonzero() == min(k, h.count_nonzero())
    assert not dropped.numel() or dropped.max() <= z[z != 0].abs().min()


def test_nan_is_kept_and_does_not_reach_other_tokens() -> None:
    h = torch.tensor([[1.0, math.nan, 3.0], [1.0, 2.0, 3.0]])
    z = keep_largest(h, 1)
    assert z[0].isnan().tolist() == [False, True, False]
    assert z[1].tolist() == [0.0, 0.0, 3.0]


@pytest.mark.parametrize("straight_through", [False, True])
def test_the_gradient_ignores_the_selection_or_is_its_own(straight_through) -> None:
    h = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    z = keep_largest(h, 2, straight_through=straight_through)
    given = torch.randn_like(z)
    (grad,) = torch.autograd.grad(z, h, given)
    assert torch.equal(grad, given if straight_through else given * (z != 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rescaling_gives_the_norm_of_h_or_1(dtype) -> None:
    h = torch.tensor([[300.0, -400.0, 0.0, 0.0], [3.0, 0.0, -4.0, 12.0], [0.0, 0.0, 0.0, 0.0]], dtype=dtype)
    unit = TopK.of(TopKConfig(k=2, rescale="unit"), neurons=4)(h)
    kept = torch.tensor([[0.6, -0.8, 0.0, 0.0], [0.0, 0.0, -4 / 160**0.5, 12 / 160**0.5], [0.0] * 4])
    torch.testing.assert_close(unit, kept.to(dtype))
    same = TopK.of(TopKConfig(k=2, rescale="norm"), neurons=4)(h)
    torch.testing.assert_close(same, (kept * torch.tensor([[500.0], [13.0], [0.0]])).to(dtype))


def test_a_share_is_rounded_and_keeps_at_least_one() -> None:
    counts = [TopK.of(TopKConfig(share=s), neurons=10).k for s in (0.01, 0.26, 0.9, 1.0)]
    assert counts == [1, 3, 9, 10]


def test_a_part_of_the_neurons_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"the 10 neurons .* 5 of them are here \(tensor parallelism"):
        TopK.of(TopKConfig(k=2), neurons=10)(torch.ones(1, 5))


@pytest.mark.parametrize("activation", ["original", "relu"])
def test_a_block_computes_the_formula(layered_type, activation, input_ids) -> None:
    model = tiny(layered_type)
    reference = copy.deepcopy(model)
    hf_sparse.patch(reference, activation)
    expected = selecting(reference)(input_ids).logits
    hf_sparse.patch(model, config(activation))
    torch.testing.assert_close(model(input_ids).logits, expected)
    torch.testing.assert_close(logits(model, input_ids, "dense"), expected)


@pytest.mark.parametrize("kind", ["llama", "phi3", "gpt2", "mixtral", "opt"])
def test_skipping_gives_the_dense_result_and_measures_exact_zeros(kind, input_ids) -> None:
    model = tiny(kind)
    hf_sparse.patch(model, config("original"))
    assert hf_sparse.measure(model, [{"input_ids": input_ids}]).sparsity == pytest.approx(1 - K / 88)
    token = input_ids[:1, :1]
    with CountSkips() as skips:
        skipping = logits(model, token, "torch")
    assert skips.count >= 3
    torch.testing.assert_close(skipping, logits(model, token, "dense"))


def test_weights_of_dropped_neurons_are_not_read() -> None:
    model = tiny("llama")
    hf_sparse.patch(model, config("original"))
    mlp, x = model.model.layers[0].mlp, torch.randn(1, 32)
    with torch.no_grad(), hf_sparse.backend("torch"):
        expected, silent = mlp(x), mlp.hidden(x)[0] == 0
        mlp.down_proj.weight[:, silent] = math.nan
        assert torch.equal(mlp(x), expected)
    assert silent.sum() == 88 - K


def test_a_trained_model_needs_few_of_its_neurons() -> None:
    """The embedded model, without any further training, on documentation of Python."""
    model = AutoModelForCausalLM.from_pretrained(TINY_MODEL)
    text = [topics["if"], topics["class"], topics["with"]]
    dense = hf_sparse.measure(model, text, sequence_length=128)
    hf_sparse.patch(model, config("original", share=0.3))
    sparse = hf_sparse.measure(model, text, sequence_length=128)
    neurons = model.config.intermediate_size
    assert sparse.sparsity == pytest.approx(1 - round(0.3 * neurons) / neurons)
    assert sparse.perplexity < 1.05 * dense.perplexity


def test_generation_that_skips_gives_the_dense_tokens(input_ids) -> None:
    model = tiny("llama")
    hf_sparse.patch(model, config("original", share=0.2))
    options = {"max_new_tokens": 8, "do_sample": False}
    with hf_sparse.backend("dense"):
        expected = model.generate(input_ids[:1], **options)
    with hf_sparse.backend("torch"), CountSkips() as skips:
        assert torch.equal(model.generate(input_ids[:1], **options), expected)
    assert skips.count >= 8 * 3


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral", "opt"])
def test_what_is_saved_comes_back_and_can_be_undone(kind, input_ids, tmp_path) -> None:
    model = tiny(kind)
    stock = model(input_ids).logits
    given = config("relu", share=0.1, straight_through=True, rescale="norm")
    hf_sparse.patch(model, given)
    expected = model(input_ids).logits
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(input_ids).logits, expected)
    assert hf_sparse.inspect(loaded).config == given
    hf_sparse.unpatch(loaded)
    assert torch.equal(loaded(input_ids).logits, stock)
    hf_sparse.unpatch(model)
    assert torch.equal(model(input_ids).logits, stock)
    assert "hf_sparse" not in str(model.config.to_dict())


def test_blocks_may_have_values_of_their_own(input_ids, tmp_path) -> None:
    model = tiny("llama")
    hf_sparse.patch(model, SparsityConfig(topk={"share": [0.5, 0.1]}, layers=(2, 0)))
    ks = [layer.mlp.topk.k for layer in (model.model.layers[0], model.model.layers[2])]
    assert ks == [9, 44]
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert hf_sparse.inspect(loaded).config.parts["topk"] == TopKConfig(share=(0.1, 0.5))
    assert torch.equal(loaded(input_ids).logits, model(input_ids).logits)


def test_layers_removed_by_hand_take_their_values_with_them() -> None:
    model = tiny("llama")
    hf_sparse.patch(model, SparsityConfig(topk={"k": [3, 4, 5]}))
    del model.model.layers[1]
    assert hf_sparse.inspect(model).config.parts["topk"] == TopKConfig(k=(3, 5))


def test_a_layer_that_was_patched_otherwise_is_not_saved(tmp_path) -> None:
    model, other = tiny("llama"), tiny("llama")
    hf_sparse.patch(model, config())
    hf_sparse.patch(other, "relu")
    layer = model.model.layers[1]
    model.model.layers[1] = other.model.layers[1]
    with pytest.raises(hf_sparse.PatchError, match=r"patched with nothing beside .* says topk"):
        model.save_pretrained(tmp_path)
    other.model.layers[1] = layer
    with pytest.raises(hf_sparse.PatchError, match=r"patched with topk beside .* says nothing"):
        other.save_pretrained(tmp_path)
    third = tiny("llama")
    hf_sparse.patch(third, config("relu", k=K, straight_through=True))
    model.model.layers[1] = third.model.layers[1]
    with pytest.raises(hf_sparse.PatchError, match="one kind of TopKConfig"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral", "opt"])
def test_a_straight_through_gradient_reaches_more_neurons(kind, input_ids) -> None:
    grads = {}
    for straight in (False, True):
        torch.manual_seed(0)
        model = tiny(kind)
        hf_sparse.patch(model, config("original", k=1, straight_through=straight))
        model(input_ids, labels=input_ids).loss.backward()
        block = hf_sparse.inspect(model).blocks[0]
        if kind == "mixtral":
            grads[straight] = block.module.gate_up_proj.grad
        else:
            first = block.module.get_submodule("fc1" if block.stays else block.roles.before_down[0])
            grads[straight] = first.weight.grad.t() if kind == "gpt2" else first.weight.grad
    some = (grads[False] != 0).flatten(0, -2).any(-1)
    assert some.any()
    assert not some.all()
    assert (grads[True] != 0).flatten(0, -2).any(-1).sum() > some.sum()


def test_dropout_inside_of_a_block_stays_in_training() -> None:
    """Seed-OSS has one in the forward of its MLP, which no child shows."""
    for part in ({"topk": {"share": 1.0}}, {}):
        model = tiny("seed_oss", residual_dropout=0.5)
        hf_sparse.patch(model, "drelu" if not part else "original", **part)
        mlp, x = model.model.layers[0].mlp, torch.randn(4, 32)
        dropped = mlp.train()(x) == 0
        assert 0.2 < dropped.float().mean() < 0.8
        assert not (mlp.eval()(x) == 0).any()


def test_the_selection_comes_before_an_adapter_of_the_down_projection(input_ids) -> None:
    model = tiny("llama")
    hf_sparse.patch(model, config("original"))
    expected = model(input_ids).logits
    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules=["down_proj"], init_lora_weights=False))
    seen = []
    down = wrapped.base_model.model.model.layers[0].mlp.down_proj
    down.lora_A["default"].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    assert not torch.equal(wrapped(input_ids).logits, expected)
    assert ((seen[0] != 0).sum(-1) == K).all()
    with wrapped.disable_adapter():
        assert torch.equal(wrapped(input_ids).logits, expected)


def test_experts_select_among_their_own_neurons() -> None:
    model = tiny("mixtral", num_local_experts=4)
    hf_sparse.patch(model, config("original"))
    experts = model.model.layers[0].mlp.experts
    chosen = torch.tensor([[0, 2], [1, 2], [3, 0], [1, 3], [2, 0]])
    x, weights, expected = torch.randn(5, 32), torch.rand(5, 2), torch.zeros(5, 32)
    with torch.no_grad():
        for token in range(5):
            for expert, weight in zip(chosen[token], weights[token], strict=True):
                gate, up = (experts.gate_up_proj[expert] @ x[token]).chunk(2)
                h = by_hand((nn.functional.silu(gate) * up)[None])[0]
                expected[token] += weight * (experts.down_proj[expert] @ h)
    torch.testing.assert_close(experts(x, chosen, weights), expected)
    with torch.no_grad(), hf_sparse.backend("torch"), CountSkips() as skips:
        torch.testing.assert_close(experts(x, chosen, weights), expected)
    assert skips.count


def test_a_plain_block_whose_module_stays_selects_what_its_activation_gives(input_ids) -> None:
    model = tiny("opt")
    reference = selecting(copy.deepcopy(model))(input_ids).logits
    hf_sparse.patch(model, config("original"))
    torch.testing.assert_close(model(input_ids).logits, reference)
    hf_sparse.patch(model, SparsityConfig.read("relu2", mix=0.5, topk={"k": K}))
    assert hf_sparse.measure(model, [{"input_ids": input_ids}]).sparsity == pytest.approx(1 - K / 88)
    hf_sparse.set_mix(model, 1.0)
    assert hf_sparse.inspect(model).config == config("relu2")


def test_a_gated_block_whose_module_stays_is_refused() -> None:
    model = tiny("bitnet")
    with pytest.raises(hf_sparse.PatchError, match="topk chooses from the product of gate and up, but model"):
        hf_sparse.patch(model, config())
    assert hf_sparse.inspect(model).config is None


def test_more_than_there_are_is_refused() -> None:
    model = tiny("llama")
    with pytest.raises(hf_sparse.PatchError, match=r"topk\.k=89 is more than the 88 neurons"):
        hf_sparse.patch(model, config("relu", k=89))
    assert hf_sparse.inspect(model).config is None


def test_the_report_names_it() -> None:
    model = tiny("llama")
    given = SparsityConfig(
        activation="original", topk={"share": [0.5, 0.1, 0.2], "rescale": "norm"}, norm_relu=True
    )
    lines = str(hf_sparse.patch(model, given)).splitlines()
    assert lines[2:5] == [
        "  activation: silu -> original",
        "  with topk (shares 0.1 to 0.5, rescale norm)",
        "  with norm_relu",
    ]


def test_certificates_are_not_used() -> None:
    model = tiny("llama")
    hf_sparse.patch(model, config())
    hf_sparse.prepare(model, certify=True)
    assert not model.model.layers[0].mlp.certify


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "topk.share=None and topk.k=None: give one"),
        ({"share": 0.1, "k": 3}, "topk.share=0.1 and topk.k=3: give one"),
        ({"share": 0}, r"topk.share=0.0 is outside of \(0, 1\]"),
        ({"share": 1.5}, "topk.share=1.5 is outside"),
        ({"share": "half"}, "topk.share='half' is not a finite number"),
        ({"k": 0}, "topk.k=0 is not a number of neurons"),
        ({"k": True}, "topk.k=True is not a number of neurons"),
        ({"k": [2, 2.5]}, r"topk.k=\[2, 2.5\] is not a number of neurons"),
        ({"k": []}, r"topk.k=\(\) has no value"),
        ({"k": 3, "straight_through": 1}, "topk.straight_through=1 is neither"),
        ({"k": 3, "rescale": "l2"}, "topk.rescale='l2' is not known"),
        ({"k": 3, "rescale": ["norm"]}, r"topk.rescale=\['norm'\] is not known"),
        ({"k": 3, "by": 1}, "unknown fields in topk: by"),
    ],
)
def test_errors_name_the_field_and_the_value(fields, message) -> None:
    with pytest.raises(ValueError, match=message):
        SparsityConfig(topk=fields)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "gpt2", "starcoder2"])
def test_one_graph_trains_and_one_skips(kind) -> None:
    torch.compiler.reset()
    model, x = tiny(kind, residual_dropout=0.0, resid_pdrop=0.0), torch.randn(2, 3, 32)
    hf_sparse.patch(model, config("original", k=K, straight_through=True))
    hf_sparse.prepare(model)
    graphs: list[torch.fx.Graph] = []

    def keep(module: torch.fx.GraphModule, _: object):
        graphs.append(module.graph)
        return module.forward

    compiled = torch.compile(
        model.get_submodule(hf_sparse.inspect(model).blocks[0].name), fullgraph=True, backend=keep
    )
    with torch.no_grad(), hf_sparse.backend("torch"):
        skipped = compiled(x)
    assert torch.ops.hf_sparse.sparse_linear.inference in {node.target for node in graphs[0].nodes}
    compiled.train()
    trained = compiled(x)
    torch.testing.assert_close(trained, skipped)
    trained.sum().backward()
    assert len(graphs) == 2
