"""Calibration: thresholds from a look at the activations, on stock and patched models."""

from __future__ import annotations

import importlib
import json
from itertools import islice
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

import hf_sparse
from hf_sparse import PatchError, SparsityConfig
from hf_sparse.assets import TINY_MODEL
from hf_sparse.assets.corpus import python_corpus
from hf_sparse.calibration.magnitudes import Magnitudes, counted
from hf_sparse.inputs import named_thresholded
from hf_sparse.texts import evaluation_texts
from support.composites import composite
from support.models import tiny
from support.padded import batches
from support.skips import CountSkips


@pytest.fixture
def pretrained() -> tuple[Any, list[str]]:
    texts = [text for _, text in zip(range(40), python_corpus().held_out, strict=False)]
    return AutoModelForCausalLM.from_pretrained(TINY_MODEL), texts


@given(
    st.lists(st.floats(-1e3, 1e3, width=32, allow_subnormal=False), min_size=1, max_size=60),
    st.floats(0.01, 0.99),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_quantiles_of_streamed_magnitudes_are_those_of_all(values, share, dtype) -> None:
    x = torch.tensor(values).to(dtype).float()
    streamed = Magnitudes()
    for part in x.split(7):
        streamed.add(counted(part.to(dtype)))
    found = streamed.quantile(share)
    assert streamed.total == len(x)
    magnitudes = x.abs().double()
    slack = found * 2**-8 + 1e-37
    assert (magnitudes <= found + slack).double().mean() >= share - 1e-9
    assert (magnitudes < found - slack).double().mean() <= share + 1e-9
    assert streamed.at_most(found) == pytest.approx(max(share, float((x == 0).double().mean())), abs=1e-6)


def test_teal_prunes_the_smallest_inputs_of_every_linear_layer() -> None:
    model, data = tiny("llama"), batches()
    inputs: dict[str, list[torch.Tensor]] = {}
    names = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    for batch in data:
        rows = batch["attention_mask"].flatten().bool()
        hooks = [
            model.get_submodule(n).register_forward_pre_hook(
                lambda _, args, n=n, rows=rows: inputs.setdefault(n, []).append(args[0].flatten(0, 1)[rows])
            )
            for n in names
        ]
        with torch.no_grad():
            model(**batch, position_ids=(batch["attention_mask"].cumsum(-1) - 1).clamp(min=0))
        for hook in hooks:
            hook.remove()
    before = hf_sparse.measure(model, data).perplexity

    report = hf_sparse.calibrate(model, data, method="teal", target_sparsity=0.4)

    assert len(names) == 21
    threshold = {name: model.get_submodule(name).pruning.threshold for name in names}
    magnitudes = {name: torch.cat(inputs[name]).abs().flatten().double() for name in names}
    level = float((magnitudes[names[0]] <= threshold[names[0]]).double().mean())
    assert level == pytest.approx(0.4, abs=0.03)
    for name in names:
        expected = float(magnitudes[name].quantile(level))
        assert threshold[name] == pytest.approx(expected, rel=0.02)
    assert report.sparsity == pytest.approx(0.4, abs=0.005)
    assert report.perplexity_before == pytest.approx(before)
    assert report.perplexity == pytest.approx(hf_sparse.measure(model, data).perplexity)
    assert report.config == hf_sparse.inspect(model).config
    assert report.tokens == 3 * 43
    assert "weights of all linear layers" in str(report)
    assert json.loads(report.to_json())["config"]["inputs"]["mlp.up_proj"]


def test_the_greedy_allocation_prunes_most_what_the_output_depends_on_least() -> None:
    model, data = tiny("llama"), batches()
    for layer in model.model.layers:  # its pruning changes nothing, so it has to come first
        torch.nn.init.zeros_(layer.self_attn.q_proj.weight)
    report = hf_sparse.calibrate(model, data, method="teal", allocation="greedy", target_sparsity=0.3)
    assert report.sparsity == pytest.approx(0.3, abs=0.03)
    uniform = tiny("llama")
    uniform.load_state_dict(model.state_dict())
    other = hf_sparse.calibrate(uniform, data, method="teal", target_sparsity=0.3)
    greedy, even = (dict(one.config.parts["inputs"].linears) for one in (report, other))
    name = "self_attn.q_proj"
    pairs = zip(greedy[name].threshold, even[name].threshold, strict=True)
    assert all(after > 1.5 * before for after, before in pairs)
    assert abs(report.increase) < abs(other.increase)


@pytest.mark.parametrize(
    ("kind", "method", "named"),
    [
        ("opt", "teal", "method='teal' is for .*, and .* stays a OPTDecoderLayer; choose another method"),
        ("bloom", "scap", "method='scap' is for .*, and .* stays a BloomMLP; choose another method"),
        ("llama", "fatrelu", "a threshold into ReLU"),
        ("mixtral", "scap", "for linear layers, and .* has stacked experts"),
        ("mixtral", "wina", "for linear layers, and .* has stacked experts"),
        ("qwen2_moe", "scap", "for linear layers, and .* has stacked experts"),
    ],
)
def test_a_model_that_the_method_does_not_suit_is_refused_and_stays(kind, method, named) -> None:
    model = tiny(kind)
    modules = list(model.modules())
    with pytest.raises(PatchError, match=named):
        hf_sparse.calibrate(model, batches(), method=method, target_sparsity=0.5)
    assert list(model.modules()) == modules
    assert hf_sparse.inspect(model).config is None


def test_fatrelu_reaches_the_sparsity_with_a_threshold_for_each_block() -> None:
    model, data = tiny("llama"), batches()
    hf_sparse.patch(model, "relu")
    plain = hf_sparse.measure(model, data)
    report = hf_sparse.calibrate(model, data, method="fatrelu", target_sparsity=0.7)
    measured = hf_sparse.measure(model, data)
    assert report.sparsity == measured.sparsity == pytest.approx(0.7, abs=0.01)
    assert [layer.sparsity for layer in measured.layers] == pytest.approx([0.7] * 3, abs=0.03)
    assert len(set(report.config.activation.threshold)) == 3
    assert report.perplexity_before == pytest.approx(plain.perplexity)
    # Calibrating again starts from ReLU, not from the thresholds of before.
    again = hf_sparse.calibrate(model, data, method="fatrelu", target_sparsity=0.6)
    assert again.sparsity == pytest.approx(0.6, abs=0.01)
    assert again.perplexity_before == report.perplexity_before
    with pytest.raises(ValueError, match="is below the"):
        hf_sparse.calibrate(model, data, method="fatrelu", target_sparsity=0.1)
    assert hf_sparse.inspect(model).config == again.config


def test_fatrelu_takes_models_that_come_with_relu() -> None:
    model = tiny("opt", activation_function="relu")
    report = hf_sparse.calibrate(model, batches(), method="fatrelu", target_sparsity=0.8)
    assert hf_sparse.measure(model, batches()).sparsity == pytest.approx(0.8, abs=0.02)
    assert report.config.activation.name == "fatrelu"


def test_padding_has_no_part_in_the_greedy_allocation() -> None:
    found = []
    for filling in (0, 7):
        torch.manual_seed(0)
        model, (batch,) = tiny("llama"), batches(1)
        batch["attention_mask"][:, :18] = 0
        batch["input_ids"][:, :18] = filling
        hf_sparse.calibrate(model, [batch], target_sparsity=0.4, allocation="greedy")
        found.append(hf_sparse.inspect(model).config)
    assert found[0] == found[1]


def test_only_the_language_part_of_a_model_is_calibrated() -> None:
    model, data = composite("llava"), batches()
    hf_sparse.patch(model, "relu", part="vision")
    before = [one.config for one in hf_sparse.inspect(model).patched]
    with pytest.raises(PatchError, match="a threshold into ReLU"):
        hf_sparse.calibrate(model, data, method="fatrelu", target_sparsity=0.8)
    assert [one.config for one in hf_sparse.inspect(model).patched] == before
    hf_sparse.calibrate(model, data, method="cats", target_sparsity=0.5)
    found = {one.part: one.config.activation.name for one in hf_sparse.inspect(model).patched}
    assert sorted(found.values()) == ["cats_silu", "relu"]


def test_what_is_out_of_reach_is_said_and_not_missed() -> None:
    model, data = tiny("llama"), batches()
    with pytest.raises(ValueError, match="is above the"):
        hf_sparse.calibrate(model, data, allocation="greedy", target_sparsity=0.99)
    with pytest.raises(PatchError, match="is a Conv1D"):
        hf_sparse.calibrate(tiny("gpt2"), data, target_sparsity=0.4)
    hf_sparse.patch(model, "fatrelu", threshold=5.0)
    with pytest.raises(ValueError, match="is below the"):
        hf_sparse.calibrate(model, data, target_sparsity=0.1)


def test_densities_that_tune_found_outlive_a_calibration_and_its_failure() -> None:
    model, data = tiny("llama"), batches()
    hf_sparse.patch(model, "relu")
    for layer in model.model.layers:
        layer.mlp.density = 0.25
    with pytest.raises(ValueError, match="labels has shape"):
        hf_sparse.calibrate(model, [*data, {**data[0], "labels": torch.zeros(1, 2)}], target_sparsity=0.4)
    assert [layer.mlp.density for layer in model.model.layers] == [0.25] * 3
    hf_sparse.calibrate(model, data, target_sparsity=0.4)
    assert [layer.mlp.density for layer in model.model.layers] == [0.25] * 3


def test_tune_knows_linear_layers_with_thresholds(own_cache) -> None:
    model, data = tiny("llama"), batches()
    hf_sparse.calibrate(model, data, method="teal", target_sparsity=0.4)
    pruned = dict(named_thresholded(model))
    assert [linear.density for linear in pruned.values()] == pytest.approx([0.6] * 21, abs=0.01)
    for linear in pruned.values():
        linear.density = None
    report = hf_sparse.tune(model, iter(data), tokens=[1])  # which can be gone through once
    found = {layer.name: layer for layer in report.layers}
    assert len(found) == 3 + 21
    assert all(found[name].density == linear.density for name, linear in pruned.items())
    assert found["model.layers.1.self_attn.q_proj"].shape == "32 -> 32 float32 linear"
    assert found["model.layers.1.self_attn.q_proj"].obstacle is None
    assert found["model.layers.1.mlp"].obstacle == "its activation is not exactly zero, or has a hook"
    assert 0.5 < found["model.layers.2.mlp.up_proj"].density < 0.7


def test_cats_silences_the_smallest_values_of_the_activation() -> None:
    model, data = tiny("llama"), batches()
    values: dict[int, list[torch.Tensor]] = {}
    for batch in data:
        rows = batch["attention_mask"].flatten().bool()
        hooks = [
            layer.mlp.act_fn.register_forward_hook(
                lambda _, args, a, i=i, rows=rows: values.setdefault(i, []).append(a.flatten(0, 1)[rows])
            )
            for i, layer in enumerate(model.model.layers)
        ]
        with torch.no_grad():
            model(**batch, position_ids=(batch["attention_mask"].cumsum(-1) - 1).clamp(min=0))
        for hook in hooks:
            hook.remove()
    before = hf_sparse.measure(model, data).perplexity
    report = hf_sparse.calibrate(model, data, method="cats", target_sparsity=0.6)
    # Each threshold is the quantile of one level of what the model's own activation gave there.
    magnitudes = {i: torch.cat(own).abs().flatten().double() for i, own in values.items()}
    thresholds = report.config.activation.threshold
    level = float((magnitudes[0] < thresholds[0]).double().mean())
    assert level == pytest.approx(0.6, abs=0.03)
    for i, threshold in enumerate(thresholds):
        assert threshold == pytest.approx(float(magnitudes[i].quantile(level)), rel=0.02)
    measured = hf_sparse.measure(model, data)
    assert report.config.activation.name == "cats_silu"
    assert report.sparsity == measured.sparsity == pytest.approx(0.6, abs=0.02)
    assert report.perplexity_before == pytest.approx(before)
    with torch.no_grad(), hf_sparse.backend("cpp"), CountSkips() as skips:
        model(data[0]["input_ids"][:1, :1])
    assert skips.count == 3
    hf_sparse.patch(model, "relu")
    with pytest.raises(PatchError, match="choose another method"):
        hf_sparse.calibrate(model, data, method="cats", target_sparsity=0.6)
    gelu = hf_sparse.calibrate(tiny("gpt2"), data, method="cats", target_sparsity=0.6)
    assert gelu.config.activation.name == "cats_gelu_tanh"


@pytest.mark.parametrize("method", ["teal", "fatrelu", "cats"])
def test_an_increase_of_perplexity_is_used_up_and_not_exceeded(method, pretrained) -> None:
    model, texts = pretrained
    if method == "fatrelu":
        hf_sparse.patch(model, "relu")
    arguments = {"sequence_length": 64, "max_tokens": 2048}
    report = hf_sparse.calibrate(model, texts, method=method, max_perplexity_increase=3.0, **arguments)
    assert 2.0 < report.increase <= 3.0
    assert report.sparsity > 0.1
    assert hf_sparse.measure(model, texts, **arguments).perplexity == pytest.approx(report.perplexity)


def test_what_a_model_has_stays_and_the_result_is_loaded(tmp_path) -> None:
    model, data = tiny("llama"), batches()
    hf_sparse.patch(model, "relu")
    hf_sparse.calibrate(model, data, method="fatrelu", target_sparsity=0.7)
    report = hf_sparse.calibrate(model, data, method="teal", target_sparsity=0.3)
    assert report.config.activation.name == "fatrelu"
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = data[0]["input_ids"]
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert hf_sparse.inspect(loaded).config == report.config


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({}, "one of them is the aim"),
        ({"target_sparsity": 0.5, "max_perplexity_increase": 1.0}, "one of them is the aim"),
        ({"target_sparsity": 50}, "it is a share"),
        ({"max_perplexity_increase": -1.0}, "it is in percent"),
        ({"target_sparsity": 0.5, "method": "cats", "allocation": "greedy"}, "is none of method 'cats'"),
        ({"target_sparsity": 0.5, "method": "magic"}, "choose one of cats, fatrelu, scap, teal, wina"),
    ],
)
def test_bad_arguments_are_named(arguments, named) -> None:
    with pytest.raises(ValueError, match=named):
        hf_sparse.calibrate(tiny("llama"), batches(), **arguments)


def test_an_iterator_and_a_mixed_activation_are_refused() -> None:
    model = tiny("llama")
    with pytest.raises(ValueError, match="several times"):
        hf_sparse.calibrate(model, iter(batches()), target_sparsity=0.5)
    hf_sparse.patch(model, SparsityConfig(activation={"name": "relu", "mix": 0.5}))
    with pytest.raises(PatchError, match="mixed in by 50%"):
        hf_sparse.calibrate(model, batches(), target_sparsity=0.5)


def test_a_failure_on_the_way_leaves_the_model_as_it_was() -> None:
    model = tiny("llama")
    hf_sparse.patch(model, "relu")
    before = hf_sparse.inspect(model).config
    bad = [*batches(1), {"input_ids": torch.zeros(2, 3, dtype=torch.int64), "labels": torch.zeros(1, 2)}]
    with pytest.raises(ValueError, match="labels has shape"):
        hf_sparse.calibrate(model, bad, target_sparsity=0.5)
    assert hf_sparse.inspect(model).config == before


def inputs_of(model: Any, data: list[dict[str, torch.Tensor]], names: list[str]) -> dict[str, torch.Tensor]:
    """What linear layers are given for the tokens of ``data`` that are no padding: float64 ``[T, F]``."""
    found: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    for batch in data:
        rows = batch["attention_mask"].flatten().bool()
        hooks = [
            model.get_submodule(name).register_forward_pre_hook(
                lambda _, args, n=name, rows=rows: found[n].append(args[0].flatten(0, 1)[rows])
            )
            for name in names
        ]
        with torch.no_grad():
            model(**batch, position_ids=(batch["attention_mask"].cumsum(-1) - 1).clamp(min=0))
        for hook in hooks:
            hook.remove()
    return {name: torch.cat(each).double() for name, each in found.items()}


def test_wina_weighs_inputs_by_the_norms_of_columns() -> None:
    model, data = tiny("llama"), batches()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[:, :8] *= 1e-3
    names = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    inputs = inputs_of(model, data, names)
    norms = {name: model.get_submodule(name).weight.detach().double().norm(dim=0) for name in names}
    report = hf_sparse.calibrate(model, data, method="wina", target_sparsity=0.4)
    for name in names:
        pruning = model.get_submodule(name).pruning
        expected = (inputs[name].abs() * norms[name]).flatten().quantile(0.4)
        assert pruning.threshold == pytest.approx(float(expected), rel=0.005)
        assert pruning.weighted
    up = model.model.layers[0].mlp.up_proj
    x = inputs["model.layers.0.mlp.up_proj"].float()
    assert up.pruning.values(x, norms["model.layers.0.mlp.up_proj"].float())[:, :8].abs().max() == 0
    assert report.sparsity == pytest.approx(0.4, abs=0.03)
    assert report.perplexity == pytest.approx(hf_sparse.measure(model, data).perplexity)
    teal = hf_sparse.calibrate(fresh := tiny("llama"), data, method="teal", target_sparsity=0.4)
    assert teal.config != report.config
    greedy = hf_sparse.calibrate(fresh, data, method="wina", allocation="greedy", target_sparsity=0.3)
    assert greedy.sparsity == pytest.approx(0.3, abs=0.03)


def test_scap_takes_what_is_near_the_mode_for_the_mode() -> None:
    model, data = tiny("gpt_neox", hidden_act="gelu"), batches()
    with torch.no_grad():
        for layer in model.gpt_neox.layers:
            weight = layer.mlp.dense_h_to_4h.weight
            weight.div_(3 * weight.norm(dim=1, keepdim=True))
            layer.mlp.dense_h_to_4h.bias.fill_(-0.75)  # where GELU has its minimum, the mode
    down = [f"gpt_neox.layers.{i}.mlp.dense_4h_to_h" for i in range(3)]
    inputs = inputs_of(model, data, down)
    report = hf_sparse.calibrate(model, data, method="scap", target_sparsity=0.5)
    assert report.sparsity == pytest.approx(0.5, abs=0.03)
    assert sorted(report.config.to_dict()["inputs"]) == ["mlp.dense_4h_to_h", "mlp.dense_h_to_4h"]
    for name in down:
        pruning = model.get_submodule(name).pruning
        x = inputs[name].flatten()
        assert -0.17 < pruning.center < -0.12
        assert ((x - pruning.center).abs() <= pruning.threshold).double().mean() == pytest.approx(
            0.5, abs=0.03
        )

        def lost(center: float, x: torch.Tensor = x) -> float:
            distances = (x - center).abs()
            return float(distances[distances <= distances.quantile(0.5)].square().sum())

        assert lost(pruning.center) < min(lost(0.0), 1.02 * lost(float(x.median())))
    # What is left out there counts in the sparsity of blocks, too; and tune knows how much it is.
    assert hf_sparse.measure(model, data).sparsity == pytest.approx(0.5, abs=0.03)
    assert [one.density for _, one in named_thresholded(model)] == pytest.approx([0.5] * 6, abs=0.03)
    within = hf_sparse.calibrate(model, data, method="scap", max_perplexity_increase=1.0)
    assert within.increase <= 1.0


@pytest.mark.parametrize("method", ["teal", "wina", "scap", "cats"])
def test_values_that_no_threshold_can_be_read_from_are_named(method) -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.gate_proj.weight.fill_(float("inf"))
    modules = list(model.modules())
    with pytest.raises(ValueError, match=r"(in the layer|activation) of model\.layers\.1\.mlp has values"):
        hf_sparse.calibrate(model, batches(), method=method, target_sparsity=0.4)
    assert list(model.modules()) == modules


def test_scap_leaves_what_teal_chose_for_attention() -> None:
    model, data = tiny("llama"), batches()
    teal = hf_sparse.calibrate(model, data, method="teal", target_sparsity=0.4).config.to_dict()["inputs"]
    scap = hf_sparse.calibrate(model, data, method="scap", target_sparsity=0.3).config.to_dict()["inputs"]
    assert scap.keys() == teal.keys()
    attention = {name for name in teal if name.startswith("self_attn")}
    assert {name for name in teal if scap[name] == teal[name]} == attention
    again = hf_sparse.calibrate(model, data, method="teal", target_sparsity=0.4).config.to_dict()["inputs"]
    assert again == teal


def test_a_target_that_other_methods_have_passed_already_is_told() -> None:
    model = tiny("llama")
    hf_sparse.calibrate(model, batches(), method="teal", target_sparsity=0.5)
    with pytest.warns(UserWarning, match=r"target_sparsity=0.3 .* nearest that was found is 0\.[45]"):
        report = hf_sparse.calibrate(model, batches(), method="cats", target_sparsity=0.3)
    assert report.sparsity > 0.4


def test_a_loader_that_shuffles_is_refused() -> None:
    rows = [{"input_ids": batch["input_ids"][0]} for batch in batches()]
    model = tiny("llama")
    with pytest.raises(ValueError, match="shuffle=False"):
        hf_sparse.calibrate(model, DataLoader(rows, shuffle=True), target_sparsity=0.5)
    assert not hf_sparse.inspect(model).patched
    hf_sparse.calibrate(model, DataLoader(rows), target_sparsity=0.5)


@pytest.mark.parametrize("method", ["teal", "wina", "scap", "cats"])
def test_a_pretrained_llama_is_calibrated_in_one_line_and_skips(method, assets) -> None:
    model = AutoModelForCausalLM.from_pretrained(assets / "stories260K")
    texts = list(islice(evaluation_texts(str(assets / "c4")), 60))
    report = hf_sparse.calibrate(model, texts, method=method, target_sparsity=0.5, max_tokens=4096)
    assert report.sparsity == pytest.approx(0.5, abs=0.01)
    assert report.perplexity_before < report.perplexity < 3 * report.perplexity_before
    with CountSkips() as skips, hf_sparse.backend("torch"):
        model.generate(torch.tensor([[1, 400, 300]]), max_new_tokens=8)
    assert skips.count > 0


METHOD = """
from hf_sparse.calibration.methods.teal import Method as Teal

class Method(Teal):
    mlp_alone = True
    counts = "the weights of the MLPs that meet an input of zero"
"""


def test_a_method_is_one_file(tmp_path, monkeypatch) -> None:
    (tmp_path / "mine.py").write_text(METHOD)
    methods = importlib.import_module("hf_sparse.calibration.methods")
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    model = tiny("llama")
    report = hf_sparse.calibrate(model, batches(), method="mine", target_sparsity=0.5)
    assert report.counts == "the weights of the MLPs that meet an input of zero"
    assert {name.partition(".")[0] for name, _ in report.config.parts["inputs"].linears} == {"mlp"}
    with pytest.raises(ValueError, match=r"method='yours' is not known; choose one of cats, fatrelu, mine, "):
        hf_sparse.calibrate(model, batches(), method="yours", target_sparsity=0.5)


def test_a_choice_on_few_tokens_is_told() -> None:
    with pytest.warns(UserWarning, match="chosen on 2 tokens, and on other text"):
        hf_sparse.calibrate(tiny("llama"), [{"input_ids": torch.tensor([[5, 7]])}], target_sparsity=0.5)
