"""The quickstart, end to end with few steps: it trains, saves, reloads, and reports what it did."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_sparse
import triton_ops
from hf_sparse.assets import TINY_MODEL
from hf_sparse.assets.corpus import python_corpus
from hf_sparse.gain import measure_gain
from hf_sparse.quickstart import _new_folder, _skips, quickstart

FEW = ("--max-steps", "6", "--global-batch", "8", "--eval-tokens", "1024", "--eval-every", "0")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    story: list[str] = []
    folder = tmp_path_factory.mktemp("quickstart") / "run"
    result = quickstart(
        output=folder,
        training=[*FEW, "--no-progress", "--methods", "{l1: {boundaries: [0.2, 1.0], targets: [1, 20]}}"],
        eval_tokens=2048,
        decode_tokens=8,
        say=story.append,
    )
    return result, "\n".join(story)


@pytest.mark.slow
def test_the_numbers_are_those_of_the_saved_model(run):
    result, _ = run
    model = AutoModelForCausalLM.from_pretrained(result.output / "finetune" / "final")
    assert len(hf_sparse.inspect(model).blocks) == 5
    assert model.config.hf_sparse["activation"] == {"name": "relu"}
    report = hf_sparse.measure(model, python_corpus().held_out, max_tokens=2048)
    assert [layer.zeros for layer in report.layers] == [layer.zeros for layer in result.after.layers]
    assert report.loss == pytest.approx(result.after.loss, rel=1e-6)


@pytest.mark.slow
def test_training_raised_sparsity(run):
    result, _ = run
    assert result.before.sparsity == 0
    assert 0.3 < result.substituted.sparsity < result.after.sparsity


@pytest.mark.slow
def test_the_report_shows_it_all(run):
    result, story = run
    assert "Load the embedded model" in story
    for layer in result.after.layers:
        assert f"{layer.sparsity:.1%}" in story
    for report in (result.before, result.substituted, result.after):
        assert f"{report.perplexity:.2f}" in story
    assert "share of exact zeros" in story
    assert not result.skips
    assert "too small for skipping to pay" in story
    assert result.dense_speed > 0
    assert result.sparse_speed > 0
    assert result.gain.sparsity == round(result.after.sparsity, 2)
    assert story.splitlines()[-1] == str(result.gain)  # the last word is what sparsity is worth
    assert story.endswith("against dense PyTorch in the same dtype)")
    written = json.loads((result.output / "report.json").read_text())
    assert written["after"]["sparsity"] == result.after.sparsity
    assert written["gain"]["sparse_ms"] == result.gain.sparse_ms
    assert (result.output / "sparsity.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_training_left_the_held_out_text_alone(run):
    result, _ = run
    lines = (result.output / "text" / "validation.jsonl").read_text(encoding="utf-8").splitlines()
    assert tuple(json.loads(line)["text"] for line in lines) == python_corpus().held_out
    assert not (result.output / "text" / "train.jsonl").read_text(encoding="utf-8").count(lines[0])


def test_earlier_results_are_never_touched(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second, third = _new_folder(None), _new_folder(None), _new_folder(None)
    assert [str(f) for f in (first, second, third)] == [
        "runs/quickstart",
        "runs/quickstart-2",
        "runs/quickstart-3",
    ]
    assert _new_folder("runs/quickstart") == first  # named, and empty
    (first / "file").touch()
    with pytest.raises(ValueError, match="not empty"):
        _new_folder("runs/quickstart")


@pytest.mark.slow
def test_a_failed_finetune_is_an_error(tmp_path, capfd):
    with pytest.raises(RuntimeError, match="exit status"):
        quickstart(
            output=tmp_path / "run", training=["--max-steps", "0"], eval_tokens=512, say=lambda _: None
        )
    assert "max_steps=0 cannot be used" in capfd.readouterr().err


@pytest.mark.slow
def test_a_model_from_a_folder_gets_settings_of_its_own(tmp_path, capfd):
    """The learning rate of the embedded model would ruin a pretrained one, and its batches take hours."""
    result = quickstart(
        model=str(TINY_MODEL),
        dataset=str(python_corpus().write(tmp_path / "text")),
        output=tmp_path / "run",
        training=["--max-steps", "2", "--no-progress"],
        eval_tokens=512,
        decode_tokens=4,
        say=lambda _: None,
    )
    log = [json.loads(line) for line in (result.output / "finetune" / "log.jsonl").read_text().splitlines()]
    recipe = log[0]["recipe"]
    assert (recipe["max_steps"], recipe["global_batch"], recipe["learning_rate"]) == (2, 8, 3e-4)
    assert recipe["sequence_length"] == result.after.sequence_length == 256
    assert result.model == str(TINY_MODEL)


def test_skipping_is_seen_and_not_guessed():
    model = AutoModelForCausalLM.from_pretrained(TINY_MODEL)
    with hf_sparse.backend("torch"):
        assert not _skips(model)
        hf_sparse.patch(model, "relu")
        assert _skips(model)
        hook = model.model.layers[0].mlp.act_fn.register_forward_hook(lambda *_: None)
        assert _skips(model)  # in the other layers
        hook.remove()
        hf_sparse.patch(model, "original")
        assert not _skips(model)  # nothing is ever exactly zero
    hf_sparse.patch(model, "relu")
    with hf_sparse.backend("dense"):
        assert not _skips(model)


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.99])
def test_the_gain_is_of_the_sparsity_and_shape_asked_for(sparsity):
    gain = measure_gain(sparsity, hidden=64, neurons=192, dtype=torch.float32)
    assert (gain.hidden, gain.neurons, gain.dtype, gain.sparsity) == (64, 192, "float32", sparsity)
    assert gain.dense_ms > 0
    assert gain.sparse_ms > 0
    assert gain.ratio == gain.dense_ms / gain.sparse_ms
    assert f"64 x 192 with {sparsity:.0%} of its neurons silent" in str(gain)
    assert f"{gain.ratio:.2f}x" in str(gain)
    assert gain.backend in str(gain)


def test_a_wrong_result_is_not_timed(monkeypatch):
    right = triton_ops.gated_mlp
    monkeypatch.setattr(triton_ops, "gated_mlp", lambda *args, **kwargs: right(*args, **kwargs) * 1.01)
    with pytest.raises(RuntimeError, match="computes a wrong MLP"):
        measure_gain(0.9, hidden=64, neurons=192, dtype=torch.float32)
