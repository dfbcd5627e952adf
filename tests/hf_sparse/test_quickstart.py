"""The quickstart, end to end with few steps: it trains, saves, reloads, and reports what it did."""

from __future__ import annotations

import json

import pytest
from transformers import AutoModelForCausalLM

import hf_sparse
from hf_sparse.assets.corpus import python_corpus
from hf_sparse.quickstart import _new_folder, quickstart

FEW = ("--max_steps", "6", "--global_batch", "8", "--eval_tokens", "1024", "--eval_every", "0")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    story: list[str] = []
    folder = tmp_path_factory.mktemp("quickstart") / "run"
    result = quickstart(
        output=folder,
        training=[*FEW, "--no-progress", "--l1_boundaries", "0.2", "1.0", "--l1_targets", "1", "20"],
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
    assert len(result.samples) == 3
    assert all(prompt in story for prompt, _ in result.samples)
    written = json.loads((result.output / "report.json").read_text())
    assert written["after"]["sparsity"] == result.after.sparsity
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
            output=tmp_path / "run", training=["--max_steps", "0"], eval_tokens=512, say=lambda _: None
        )
    assert "max_steps=0 cannot be used" in capfd.readouterr().err
