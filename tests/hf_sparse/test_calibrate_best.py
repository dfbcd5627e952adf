"""Calibration by the method that is best for the model: all are tried, and compared by weights."""

from __future__ import annotations

import importlib
import json
from itertools import islice
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_sparse
from hf_sparse import PatchError
from hf_sparse.assets import TINY_MODEL
from hf_sparse.cli import main
from hf_sparse.inputs import named_thresholded
from hf_sparse.texts import evaluation_texts
from support.models import tiny
from support.padded import batches
from support.skips import CountSkips


def llama() -> Any:
    return tiny("llama")


def relu_llama() -> Any:
    model = tiny("llama")
    hf_sparse.patch(model, "relu")
    return model


def phi() -> Any:
    return tiny("phi3")


def neox() -> Any:
    return tiny("gpt_neox", hidden_act="gelu")


def opt() -> Any:
    return tiny("opt", activation_function="relu")


def linears(model: Any) -> dict[str, torch.nn.Linear]:
    """Those of the layers, by name."""
    found = {name: one for name, one in model.named_modules() if isinstance(one, torch.nn.Linear)}
    return {name: one for name, one in found.items() if "layers." in name}


def is_mlp(name: str) -> bool:
    return ".mlp." in name or ".fc" in name


def own_sparsity(model: Any, method: str, target: float) -> float:
    """What a method is to prune of what it prunes, for ``target`` of all weights."""
    sizes = {name: one.in_features * one.out_features for name, one in linears(model).items()}
    mlp = sum(size for name, size in sizes.items() if is_mlp(name))
    gated = any("gate" in name for name in sizes)
    kind = "input" if method in ("teal", "wina") else method
    reached = {"input": sum(sizes.values()), "scap": mlp}.get(kind, mlp * 2 // 3 if gated else mlp // 2)
    return target / (reached / sum(sizes.values()))


def unread(model: Any, data: list[dict[str, torch.Tensor]]) -> float:
    """The share of weights that tokens do not need, one linear layer and token after the other."""
    given: dict[str, torch.Tensor] = {}
    layers = linears(model)
    silences = hf_sparse.inspect(model).config.activation.name != "original"
    spared = every = 0
    for batch in data:
        rows = batch["attention_mask"].flatten().bool()
        hooks = [
            one.register_forward_pre_hook(
                lambda _, args, name=name, rows=rows: given.__setitem__(name, args[0].flatten(0, -2)[rows])
            )
            for name, one in layers.items()
        ]
        with torch.no_grad():
            extra = {"position_ids": (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)}
            model(**batch, **({} if "opt" in model.config.model_type else extra))
        for hook in hooks:
            hook.remove()
        for name, one in layers.items():
            x, pruning = given[name], getattr(one, "pruning", None)
            every += len(x) * one.weight.numel()
            if pruning is not None:
                score = (x - pruning.center).abs()
                score = score * one.weight.norm(dim=0) if pruning.weighted else score
                spared += int((score <= pruning.threshold).sum()) * one.out_features
            elif silences and ("down" in name or "fc2" in name or "4h_to_h" in name):
                silent = int((x == 0).sum())
                # A plain block reads its up projection to decide, and one with thresholds is called.
                called = any(is_mlp(name) and hasattr(other, "pruning") for name, other in layers.items())
                up = any("gate" in name for name in layers) and not called
                spared += silent * one.out_features * (2 if up else 1)
    return spared / every


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "target", "suited"),
    [
        (llama, 0.3, {"teal", "wina", "scap", "cats"}),
        (phi, 0.3, {"teal", "wina", "scap", "cats"}),
        (neox, 0.25, {"teal", "wina", "scap", "cats"}),
        (relu_llama, 0.4, {"teal", "wina", "scap", "fatrelu"}),
        (opt, 0.25, {"fatrelu"}),
    ],
    ids=lambda one: getattr(one, "__name__", None),
)
def test_the_kept_method_has_the_least_perplexity_at_one_share_of_weights(make, target, suited) -> None:
    data = batches(6)
    torch.manual_seed(0)
    model = make()
    report = hf_sparse.calibrate(model, data, method="best", target_sparsity=target)
    tried = {one.method: one for one in report.tried if one.left_out is None}
    assert tried.keys() == suited
    assert {one.method for one in report.tried} == {"cats", "fatrelu", "scap", "teal", "wina"}
    by_hand: dict[str, Any] = {}
    for method, row in tried.items():
        torch.manual_seed(0)
        other = make()
        found = hf_sparse.calibrate(
            other, data, method=method, target_sparsity=own_sparsity(other, method, target)
        )
        by_hand[method] = other, found
        assert row.sparsity == found.sparsity
        assert row.perplexity == found.perplexity
        assert unread(other, data) == pytest.approx(target, abs=0.02)
        assert row.unread == pytest.approx(unread(other, data), abs=0.005)
    kept = min(by_hand, key=lambda method: by_hand[method][1].perplexity)
    other, found = by_hand[kept]
    assert report.method == report.tried[0].method == kept
    assert {**report.to_dict(), "tried": []} == found.to_dict()
    assert type(model) is type(other)
    assert hf_sparse.inspect(model).config == hf_sparse.inspect(other).config == report.config
    ids = data[0]["input_ids"]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, other(ids).logits)
    densities = [[one.density for _, one in named_thresholded(which)] for which in (model, other)]
    assert densities[0] == densities[1]


@pytest.mark.slow
def test_within_a_budget_the_one_that_leaves_most_weights_unread_is_kept(assets) -> None:
    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(assets / "stories260K")

    texts = list(islice(evaluation_texts(str(assets / "c4")), 30))
    options: dict[str, Any] = {"max_perplexity_increase": 5.0, "max_tokens": 1024, "sequence_length": 128}
    report = hf_sparse.calibrate(model := load(), texts, method="best", **options)
    tried = [one for one in report.tried if one.left_out is None]
    assert {one.method for one in tried} == {"cats", "scap", "teal", "wina"}
    assert all(one.perplexity <= 1.05 * report.perplexity_before for one in tried)
    assert tried[0].unread == max(one.unread for one in tried) > min(one.unread for one in tried)
    direct = hf_sparse.calibrate(other := load(), texts, method=tried[0].method, **options)
    assert report.config == direct.config
    ids = torch.tensor([[1, 400, 300]])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, other(ids).logits)


@pytest.mark.slow
def test_a_pretrained_llama_gets_the_share_that_was_asked_for(assets) -> None:
    model = AutoModelForCausalLM.from_pretrained(assets / "stories260K")
    texts = list(islice(evaluation_texts(str(assets / "c4")), 60))
    report = hf_sparse.calibrate(model, texts, method="best", target_sparsity=0.3, max_tokens=2048)
    tried = [one for one in report.tried if one.left_out is None]
    assert [one.unread for one in tried] == pytest.approx([0.3] * 4, abs=0.01)
    assert [one.perplexity for one in tried] == sorted(one.perplexity for one in tried)
    assert report.perplexity == tried[0].perplexity < 0.9 * tried[-1].perplexity
    with CountSkips() as skips, hf_sparse.backend("torch"):
        model.generate(torch.tensor([[1, 400, 300]]), max_new_tokens=8)
    assert skips.count > 0


def test_of_experts_those_count_that_a_token_is_routed_to() -> None:
    model, data = tiny("mixtral", num_experts_per_tok=2, num_local_experts=4), batches(6)
    report = hf_sparse.calibrate(model, data, method="best", target_sparsity=0.3)
    assert report.method == "cats"
    attention = sum(one.weight.numel() for one in linears(model).values()) // 3
    neurons = 2 * 88  # of two experts
    share = report.sparsity * 2 * 32 * neurons / (attention + 3 * 32 * neurons)
    assert report.tried[0].unread == pytest.approx(share)
    assert share == pytest.approx(0.3, abs=0.02)


def test_the_report_shows_what_was_tried() -> None:
    report = hf_sparse.calibrate(llama(), batches(6), method="best", target_sparsity=0.5)
    lines = str(report).splitlines()
    assert lines[0].startswith(f"{report.method}: sparsity ")
    assert lines[2].split() == ["method", "sparsity", "unread", "perplexity"]
    assert lines[4].split()[0] == report.method
    assert lines[4].endswith("kept")
    # CATS spares up and down, two thirds of an MLP that is 73 % of the layer: 48.9 % of it.
    assert not [line for line in lines if line.startswith("cats")]
    assert [line for line in lines if line.startswith("left out: ")] == [
        "left out: cats, it would need a sparsity of 102.3%, and has 0.0% to 100.0%",
        lines[-1],
    ]
    assert "fatrelu, method='fatrelu' puts a threshold into ReLU" in lines[-1]
    rows = json.loads(report.to_json())["tried"]
    assert [row["method"] for row in rows] == [one.method for one in report.tried]
    assert rows[0]["unread"] == report.tried[0].unread
    assert rows[0]["left_out"] is None
    single = hf_sparse.calibrate(llama(), batches(6), method="teal", target_sparsity=0.5)
    assert single.tried == ()
    assert "unread" not in str(single)


def stays(
    model: Any, data: list[dict[str, torch.Tensor]], error: type[Exception], named: str, **asked
) -> None:
    """An error that leaves the model as it was."""
    ids, modules = data[0]["input_ids"], list(model.modules())
    kinds, config = [type(one) for one in modules], hf_sparse.inspect(model).config
    with torch.no_grad():
        before = model(ids).logits
    with pytest.raises(error, match=named):
        hf_sparse.calibrate(model, data, method="best", **{"target_sparsity": 0.3, **asked})
    assert [type(one) for one in model.modules()] == kinds
    assert hf_sparse.inspect(model).config == config
    with torch.no_grad():
        assert torch.equal(model(ids).logits.nan_to_num(), before.nan_to_num())
    if config is None:
        assert list(model.modules()) == modules
        assert "hf_sparse" not in json.dumps(model.config.to_dict())


@pytest.mark.parametrize("make", [llama, relu_llama])
def test_a_failure_leaves_the_model_as_it_was(make) -> None:
    bad = [*batches(1), {"input_ids": torch.zeros(2, 3, dtype=torch.int64), "labels": torch.zeros(1, 2)}]
    stays(make(), bad, ValueError, "labels has shape")
    model = make()
    with torch.no_grad():
        model.model.layers[1].mlp.gate_proj.weight.fill_(float("inf"))
    stays(model, batches(6), ValueError, "has values that are infinite")


def test_what_no_method_can_is_refused_with_the_reasons() -> None:
    conv = tiny("gpt2")
    stays(conv, batches(6), ValueError, r"(?s)leaves that share.*\ncats: it would need .*\nteal: .*Conv1D")
    none = tiny("gpt2", activation_function="quick_gelu")
    reasons = (
        r"(?s)^no method of calibration suits the model\.\ncats: .*\nfatrelu: .*\nscap: .*\nteal: .*\nwina: "
    )
    stays(none, batches(6), PatchError, reasons, target_sparsity=0.1)
    stays(llama(), batches(6), ValueError, "is none of method 'best'; use uniform", allocation="greedy")


@pytest.mark.parametrize(("method", "make"), [("teal", llama), ("cats", llama), ("fatrelu", relu_llama)])
def test_methods_are_not_compared_on_a_model_that_has_thresholds(method, make) -> None:
    model = make()
    hf_sparse.calibrate(model, batches(6), method=method, target_sparsity=0.6)
    stays(model, batches(6), PatchError, "that the model has already")


def test_a_choice_on_few_tokens_is_told_once(recwarn) -> None:
    hf_sparse.calibrate(llama(), batches(1), method="best", target_sparsity=0.3)
    assert len([one for one in recwarn if "chosen on 43 tokens" in str(one.message)]) == 1


def test_a_sparsity_below_what_relu_has_is_told() -> None:
    report = hf_sparse.calibrate(relu_llama(), batches(6), method="best", target_sparsity=0.15)
    reasons = {one.method: one.left_out for one in report.tried}
    assert reasons["teal"] is None
    assert reasons["fatrelu"].startswith("it would need a sparsity of 30.7%, and has ")


def test_a_method_that_misses_the_target_by_far_is_left_out() -> None:
    model = llama()
    hf_sparse.patch(model, "original", topk={"share": 0.1})  # after which 22 % of the weights are unread
    stays(
        model,
        batches(6),
        ValueError,
        r"(?s)cats: 2\d\.\d% of the weights is the nearest .*teal: it would need .* of 10.0%, and has 2",
        target_sparsity=0.1,
    )


METHOD = """
from hf_sparse.calibration.methods.teal import Method as Teal

class Method(Teal):
    mlp_alone = True
"""


def test_a_method_that_is_one_file_takes_part(tmp_path, monkeypatch) -> None:
    (tmp_path / "own_file.py").write_text(METHOD)
    methods = importlib.import_module("hf_sparse.calibration.methods")
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    model = llama()
    report = hf_sparse.calibrate(model, batches(6), method="best", target_sparsity=0.3)
    row = next(one for one in report.tried if one.method == "own_file")
    assert row.unread == pytest.approx(0.3, abs=0.02)
    assert row.sparsity == pytest.approx(own_sparsity(model, "scap", 0.3), abs=0.01)


@pytest.mark.slow
def test_the_command_takes_it_for_a_method(tmp_path, capsys) -> None:
    arguments = ["--method", "best", "--target-sparsity", "0.2", "--max-tokens", "300"]
    file, output = tmp_path / "report.json", tmp_path / "model"
    options = ["--sequence-length", "64", "--json", str(file), "--output", str(output)]
    assert main(["calibrate", "tiny", *arguments, *options]) == 0
    printed = capsys.readouterr().out
    report = json.loads(file.read_text())
    assert printed.startswith(f"{report['method']}: sparsity ")
    assert "kept" in printed
    assert {row["method"] for row in report["tried"]} == {"cats", "fatrelu", "scap", "teal", "wina"}
    loaded = AutoModelForCausalLM.from_pretrained(output)
    assert hf_sparse.inspect(loaded).config.to_dict() == report["config"]
    stock = AutoModelForCausalLM.from_pretrained(TINY_MODEL)
    assert not torch.equal(loaded(torch.tensor([[5, 7, 9]])).logits, stock(torch.tensor([[5, 7, 9]])).logits)
