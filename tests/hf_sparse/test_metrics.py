"""The metrics of hf_sparse.measure: each against its definition, one token at a time; sums, files, errors."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path

import pytest
import torch

import hf_sparse
from hf_sparse.metrics.registry import metrics
from hf_sparse.metrics.union import BATCHES, CHUNKS
from support.activations import OWN
from support.composites import composite, inputs
from support.models import tiny, tiny_t5
from support.sites import padded, relu_model, seen
from triton_ops.activations import ACTIVATIONS, TABLE

FAMILIES = ("llama", "opt", "gpt2")
PADDING = ("none", "left", "right")
ROOT = Path(__file__).resolve().parents[2]


def layers_of(model, batches, name, **options):
    return hf_sparse.measure(model, batches, metrics=[name], **options).metrics[name].layers


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("padding", PADDING)
def test_density_by_token_and_by_neuron_is_that_of_the_definition(family, padding):
    model = relu_model(family)
    batch = padded(padding)
    expected = seen(model, [batch])
    layers = layers_of(model, [batch], "density")
    assert len(layers) == len(expected) == 3
    for layer, one in zip(layers, expected, strict=True):
        active = torch.cat(one.h) != 0
        counts = sorted(int(row.sum()) for row in active)
        assert layer.tokens == len(active)
        assert list(layer.histogram) == [counts.count(n) for n in range(89)]
        assert list(layer.fired) == [int(column.sum()) for column in active.T]
        assert layer.dead == sum(not column.any() for column in active.T)
        assert layer.always_on == sum(int(column.sum()) / len(active) > 0.99 for column in active.T)
        assert layer.quantile(0.5) == counts[math.ceil(len(counts) / 2) - 1] / 88
        assert (layer.quantile(0), layer.quantile(1)) == (counts[0] / 88, counts[-1] / 88)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("padding", PADDING)
def test_unions_are_those_of_whole_chunks_and_of_sequences_at_one_position(family, padding):
    model = relu_model(family)
    batch = padded(padding)
    expected = seen(model, [batch])
    for layer, one in zip(layers_of(model, [batch], "union"), expected, strict=True):
        sequences = [h != 0 for h in one.h]
        for i, size in enumerate(CHUNKS):
            chunks = [
                torch.stack([s[at + k] for k in range(size)]).any(0)
                for s in sequences
                for at in range(0, len(s) - size + 1, size)
            ]
            assert layer.chunks[i] == len(chunks) > 0
            assert layer.in_chunks[i] == sum(int(chunk.sum()) for chunk in chunks)
        for i, size in enumerate(BATCHES):
            groups = [sequences[at : at + size] for at in range(0, len(sequences) - size + 1, size)]
            unions = [
                torch.stack([s[t] for s in group]).any(0)
                for group in groups
                for t in range(min(map(len, group)))
            ]
            assert layer.batches[i] == len(unions)
            assert layer.in_batches[i] == sum(int(union.sum()) for union in unions)
        assert layer.batches[-1] == 0  # five sequences make no group of eight


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("padding", PADDING)
def test_derivatives_of_relu_are_zero_where_the_preactivation_is_not_positive(family, padding):
    model = relu_model(family)
    batch = padded(padding)
    expected = seen(model, [batch])
    for layer, one in zip(layers_of(model, [batch], "derivative"), expected, strict=True):
        assert layer.zeros == int((torch.cat(one.p) <= 0).sum()) > 0
        assert layer.sparsity == layer.zeros / (layer.tokens * 88)


@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name != "relu"])
def test_derivatives_of_every_activation_are_those_of_autograd(activation):
    model = tiny("llama", hidden_act=OWN.get(activation, "silu"))
    parameter = TABLE[activation].parameter
    hf_sparse.patch(model, activation, **({parameter.name: 0.1} if parameter else {}))
    batch = padded("right")
    expected = seen(model, [batch])
    for block, layer, one in zip(
        hf_sparse.inspect(model).blocks, layers_of(model, [batch], "derivative"), expected, strict=True
    ):
        p = torch.cat(one.p).requires_grad_()
        block.activation(p).sum().backward()
        assert layer.zeros == int((p.grad == 0).sum()) > 0


def test_an_activation_that_no_table_knows_is_differentiated():
    model = tiny("gpt2", activation_function="relu6")
    for layer in model.transformer.h:
        layer.mlp.c_fc.weight.data *= 8  # so that some are beyond 6
    batch = padded("left")
    expected = seen(model, [batch])
    report = hf_sparse.measure(model, [batch], metrics=["derivative", "density"])
    pairs = zip(report.metrics["derivative"].layers, report.metrics["density"].layers, expected, strict=True)
    for layer, density, one in pairs:
        p = torch.cat(one.p)
        assert layer.zeros == int(((p <= 0) | (p >= 6)).sum())
        assert layer.zeros > p.numel() - density.active  # flat, and not zero
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert layers_of(tiny("gpt2"), [batch], "derivative")[0].zeros == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_all_metrics_of_parts_add_up_to_those_of_the_whole(family):
    model = relu_model(family)
    batches = [padded(padding) for padding in PADDING]
    whole = hf_sparse.measure(model, batches, metrics=metrics())
    summed = sum(hf_sparse.measure(model, [batch], metrics=metrics()) for batch in batches)
    assert list(whole.metrics) == list(summed.metrics) == list(metrics())
    assert pickle.loads(pickle.dumps(whole)) == whole  # as processes send it
    for name in set(metrics()) - {"cett"}:
        assert summed.metrics[name] == whole.metrics[name]
    for a, b in zip(summed.metrics["cett"].layers, whole.metrics["cett"].layers, strict=True):
        assert a.removed == b.removed
        assert a.errors == pytest.approx(b.errors, rel=1e-5)


def test_reports_with_metrics_go_through_a_file_and_are_printed(tmp_path):
    model = relu_model("llama")
    report = hf_sparse.measure(model, [padded("right")], metrics=metrics())
    report.to_json(tmp_path / "r.json")
    read = hf_sparse.SparsityReport.from_json(tmp_path / "r.json")
    assert read.metrics == report.metrics
    assert (read + report).metrics["density"].layers[0].tokens == 2 * report.tokens
    data = json.loads((tmp_path / "r.json").read_text())
    shares = data["metrics"]["union"]["layers"][1]["shares"]
    layer = report.metrics["union"].layers[1]
    assert shares["4 tokens"] == layer.in_chunks[2] / (layer.chunks[2] * 88)
    assert shares["8 sequences"] is None
    total = sum(one.in_chunks[2] for one in report.metrics["union"].layers) / (3 * layer.chunks[2] * 88)
    assert data["metrics"]["union"]["shares"]["4 tokens"] == total
    text = str(report)
    assert f"{shares['4 tokens']:.2%}" in text
    assert all(f"\n{name}: {cls.about}" in text for name, cls in metrics().items())
    assert "metrics" not in hf_sparse.measure(model, [padded("right")]).to_dict()


def test_a_file_whose_numbers_contradict_each_other_is_refused(tmp_path):
    report = hf_sparse.measure(relu_model("llama"), [padded("right")], metrics=metrics())
    path = tmp_path / "r.json"
    for name, field, value in (
        ("density", "histogram", [1] * 89),
        ("density", "fired", [-1] * 88),
        ("density", "tokens", "many"),
        ("union", "in_chunks", [10**9] * 6),
        ("union", "batches", [1]),
        ("derivative", "zeros", 10**9),
        ("derivative", "zeros", [True]),
        ("cett", "removed", list(range(258, 0, -1))),
        ("cett", "errors", [math.nan] * 258),
    ):
        data = report.to_dict()
        data["metrics"][name]["layers"][0][field] = value
        path.write_text(json.dumps(data))
        with pytest.raises(ValueError, match=r"r\.json is no report of a measurement"):
            hf_sparse.SparsityReport.from_json(path)
    path.write_text(json.dumps({**report.to_dict(), "metrics": {"mass": {}}}))
    with pytest.raises(ValueError, match="unknown fields in metrics: mass; known: cett, density"):
        hf_sparse.SparsityReport.from_json(path)


def test_nan_is_neither_silent_nor_flat():
    model = relu_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.gate_proj.weight.fill_(math.nan)
    report = hf_sparse.measure(model, [padded("none")], metrics=["density", "derivative", "union"])
    assert report.metrics["density"].layers[1].fired == (5 * 37,) * 88
    assert report.metrics["derivative"].layers[1].zeros == 0
    assert report.metrics["union"].layers[1].in_chunks[0] == 5 * 37 * 88
    with pytest.raises(ValueError, match=r"not finite reach the down projection of model\.layers\.1\.mlp"):
        hf_sparse.measure(model, [padded("none")], metrics=["cett"])


def test_of_experts_what_needs_their_numbers_is_not_known_and_the_rest_is():
    model = tiny("mixtral")
    hf_sparse.patch(model, "relu")
    batches = [padded("left"), padded("none")]
    report = hf_sparse.measure(model, batches, metrics=["density", "derivative", "union"])
    for sparsity, density, derivative, union in zip(
        report.layers,
        *(report.metrics[name].layers for name in ("density", "derivative", "union")),
        strict=True,
    ):
        assert density.tokens == sparsity.tokens == 2 * (137 + 185)  # each goes to two experts
        assert density.active == sparsity.tokens * 88 - sparsity.zeros
        assert derivative.zeros == sparsity.zeros
        assert density.fired is density.dead is density.always_on is union.in_chunks is None
    assert "?" in str(report)
    parts = [hf_sparse.measure(model, [batch], metrics=["density", "union"]) for batch in batches]
    assert sum(parts).metrics["density"] == report.metrics["density"]
    assert hf_sparse.SparsityReport.from_dict(report.to_dict()).metrics == report.metrics
    with pytest.raises(hf_sparse.PatchError, match=r"model\.layers\.0\.mlp\.experts has stacked experts"):
        hf_sparse.measure(model, batches, metrics=["cett"])


def test_encoder_and_decoder_have_sequences_of_their_own():
    model = tiny_t5()
    batch = padded("right", (9, 6)) | {"labels": torch.randint(3, 128, (2, 5))}
    batch["labels"][1, 3:] = -100
    inputs: list[torch.Tensor] = []
    downs = [module for name, module in model.named_modules() if name.endswith("wo")]
    hooks = [down.register_forward_pre_hook(lambda m, args: inputs.append(args[0] != 0)) for down in downs]
    with torch.no_grad():
        model(**batch)
    for hook in hooks:
        hook.remove()
    layers = layers_of(model, [batch], "union")
    assert [layer.chunks[1] for layer in layers] == [4 + 3, 4 + 3, 2 + 1, 2 + 1]
    assert [layer.batches[1] for layer in layers] == [6, 6, 3, 3]
    for layer, active, (first, second) in zip(layers, inputs, [(9, 6), (9, 6), (5, 3), (5, 3)], strict=True):
        rows = [active[0, :first], active[1, :second]]
        pairs = [row[at] | row[at + 1] for row in rows for at in range(0, len(row) - 1, 2)]
        assert layer.in_chunks[1] == sum(int(pair.sum()) for pair in pairs)
        assert layer.in_batches[1] == int((rows[0][:second] | rows[1]).sum())


def test_texts_are_sequences_of_a_window_each():
    from transformers import AutoTokenizer

    from hf_sparse.assets import TINY_MODEL

    model = relu_model("llama")
    model.resize_token_embeddings(1536)
    options = {"tokenizer": AutoTokenizer.from_pretrained(TINY_MODEL), "sequence_length": 8, "batch_size": 2}
    layers = layers_of(model, ["If the file does not exist, raise an error."] * 4, "union", **options)
    assert layers[0].chunks[3] == layers[0].tokens // 8 > 0 == layers[0].chunks[4]


def test_names_that_are_no_metrics_and_reports_without_them_are_refused():
    model, batch = relu_model("llama"), padded("none")
    with pytest.raises(ValueError, match="unknown fields in metrics: unions; known: cett, density"):
        hf_sparse.measure(model, [batch], metrics=["unions"])
    with pytest.raises(ValueError, match=r"metrics='union' is one text; give a list of names: \['union'\]"):
        hf_sparse.measure(model, [batch], metrics="union")
    with pytest.raises(ValueError, match=r"metrics=\['union'\] and \[\] do not add up"):
        hf_sparse.measure(model, [batch], metrics=["union"]) + hf_sparse.measure(model, [batch])
    layer = layers_of(model, [batch], "density")[0]
    with pytest.raises(ValueError, match="q=2 is no share"):
        layer.quantile(2)


def test_a_block_that_gets_its_tokens_in_pieces_has_no_unions():
    model = tiny("bert", chunk_size_feed_forward=4)
    batch = {"input_ids": torch.randint(3, 128, (2, 8))}
    assert layers_of(model, [batch], "density")[0].tokens == 16
    with pytest.raises(ValueError, match="received 8 tokens of a batch of 16, so that its sequences"):
        layers_of(model, [batch], "union")


def test_an_activation_that_is_written_into_a_stock_forward_is_measured_once_it_is_patched():
    model, batch = tiny("lfm2"), padded("none")
    with pytest.raises(ValueError, match="a stock Lfm2MLP cannot be watched"):
        layers_of(model, [batch], "derivative")
    hf_sparse.patch(model, "original")
    assert layers_of(model, [batch], "derivative")[0].zeros == 0


def test_what_is_mixed_in_and_what_selects_is_differentiated_as_it_is_now():
    model, batch = tiny("llama"), padded("left")
    hf_sparse.patch(model, "relu")
    hf_sparse.set_mix(model, 0.5)
    assert [layer.zeros for layer in layers_of(model, [batch], "derivative")] == [0] * 3
    hf_sparse.set_mix(model, 1.0)
    zeros = [layer.zeros for layer in layers_of(model, [batch], "derivative")]
    hf_sparse.patch(model, "relu", topk={"k": 5})
    report = hf_sparse.measure(model, [batch], metrics=["derivative", "density"])
    assert report.metrics["derivative"].layers[0].zeros == zeros[0] > 0
    assert all(layer.quantile(1) == 5 / 88 for layer in report.metrics["density"].layers)
    hf_sparse.patch(model, "original", statistical_topk={"sparsity": 0.8})
    report = hf_sparse.measure(model, [batch], metrics=["derivative"])
    assert report.sparsity > 0.7
    assert all(layer.zeros == 0 for layer in report.metrics["derivative"].layers)


def test_parts_that_see_no_text_are_in_no_metric():
    model = composite("gemma3")
    hf_sparse.patch(model, "relu")
    batch = {"input_ids": inputs("gemma3")["input_ids"][:, 5:]}
    report = hf_sparse.measure(model, [batch], metrics=metrics())
    names = [layer.name for layer in report.layers]
    assert len(names) == 3
    for one in report.metrics.values():
        assert [layer.name for layer in one.layers] == names
        assert all(layer.tokens == batch["input_ids"].numel() for layer in one.layers)


METRIC = """
from dataclasses import dataclass
import torch
from hf_sparse.metrics.metric import LayerMetric, Metric

@dataclass(frozen=True, kw_only=True)
class LayerMass(LayerMetric):
    mass: float
    def shares(self):
        return {"mass per neuron": (self.mass, self.tokens * self.neurons)}

class Mass(Metric):
    name, about, site, layer, mass = "mass", "mean of |h|", "h", LayerMass, 0.0
    def count(self, values, routed):
        self.mass += values.abs().double().sum().item()
    def result(self):
        return LayerMass(**self.about_block(), mass=self.mass)
"""


def test_a_metric_is_one_file(tmp_path, monkeypatch):
    (tmp_path / "mass.py").write_text(METRIC)
    monkeypatch.setattr(hf_sparse.metrics, "__path__", [*hf_sparse.metrics.__path__, str(tmp_path)])
    monkeypatch.delattr(hf_sparse.metrics, "mass", raising=False)
    metrics.cache_clear()
    try:
        model, batch = relu_model("gpt2"), padded("left")
        report = hf_sparse.measure(model, [batch], metrics=["mass"])
        for layer, one in zip(report.metrics["mass"].layers, seen(model, [batch]), strict=True):
            assert layer.mass == pytest.approx(torch.cat(one.h).abs().double().sum().item())
        assert hf_sparse.SparsityReport.from_dict(report.to_dict()) == report
        assert "mass: mean of |h|" in str(report + report)
    finally:
        metrics.cache_clear()


def test_every_metric_is_in_the_manual():
    manual = (ROOT / "docs" / "measuring.md").read_text()
    for name, cls in metrics().items():
        assert f"`{name}`" in manual
        assert cls.about
