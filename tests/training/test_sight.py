"""What a run shows of itself: sparsity while training, the bar, dead neurons, trackers."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest
import torch
from run_log import read_log
from torch import nn
from training_sparsity import TrainingSparsity

import hf_sparse
from hf_sparse.objectives import L1Penalty
from support.models import untrained_llama
from support.runs import run, sentences, write_jsonl


def records(output, kind):
    return [r for r in read_log(output / "log.jsonl") if r["kind"] == kind]


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = untrained_llama(intermediate_size=48, num_hidden_layers=2)
    hf_sparse.patch(model, "relu")
    return model.train()


def zeros_by_hand(model: nn.Module, ids: torch.Tensor) -> list[torch.Tensor]:
    seen: list[torch.Tensor] = []
    downs = [m for name, m in model.named_modules() if name.endswith("down_proj")]
    handles = [m.register_forward_pre_hook(lambda _, args: seen.append((args[0] == 0).sum())) for m in downs]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("checkpointing", [False, True])
def test_zeros_are_those_of_the_forwards_of_one_update(model, checkpointing):
    parts = torch.randint(3, 60, (3, 2, 10))
    expected = [zeros_by_hand(model, ids) for ids in parts]
    if checkpointing:  # recomputed in backward, and not counted there
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    sparsity = TrainingSparsity(model, compiled=False)
    model(parts[0], labels=parts[0]).loss.backward()
    assert sparsity.result(lambda own: own) == {}
    for step, both in ((1, (0, 1)), (2, (1, 2))):
        for i in both:
            for _ in range(2):  # twice, as an optimiser that looks around asks for it
                sparsity.begin(step, i)
                model(parts[i], labels=parts[i]).loss.backward()
        model(parts[0], labels=parts[0]).loss.backward()  # not told of
        found = sparsity.result(lambda own: own)
        values = 2 * 2 * 10 * 48
        by_layer = [float(expected[both[0]][n] + expected[both[1]][n]) / values for n in (0, 1)]
        assert found["layers"] == {f"model.layers.{n}.mlp": pytest.approx(by_layer[n]) for n in (0, 1)}
        assert found["sparsity"] == pytest.approx(sum(by_layer) / 2)


def test_it_changes_no_gradient_and_leaves_no_hook(model):
    ids = torch.randint(3, 60, (2, 10))
    gradients = []
    for watched in (False, True):
        sparsity = TrainingSparsity(model, compiled=False) if watched else None
        with L1Penalty(model) as l1:
            if sparsity is not None:
                sparsity.begin(1, 0)
            (model(ids, labels=ids).loss + l1.value()).backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        model.zero_grad()
        if sparsity is not None:
            sparsity.detach()
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_the_log_has_sparsity_while_training_and_dead_neurons(command, in_process, tmp_path):
    fields = {"max_steps": 8, "log_every": 4, "eval_every": 4, "save_every": 100}
    for name, size in (("a", 8), ("b", 3)):
        in_process(command(tmp_path / name, micro_batch=size, **fields))
    a, b = (records(tmp_path / name, "train") for name in ("a", "b"))
    for one, other in zip(a, b, strict=True):
        assert 0.2 < one["sparsity"] < 0.8
        assert one["layers"].keys() == {"model.layers.0.mlp", "model.layers.1.mlp"}
        assert sum(one["layers"].values()) / 2 == pytest.approx(one["sparsity"])
        assert other["sparsity"] == pytest.approx(one["sparsity"], abs=1e-3)  # of all micro-batches
        assert 0 <= one["data_wait"] <= 1
        assert one["bad_documents"] == 0
    for record in records(tmp_path / "a", "eval"):
        assert record["dead"] == sum(record["dead_by_layer"].values()) >= 0


@pytest.mark.filterwarnings("ignore:a document is left out")
def test_bad_documents_are_counted_over_all_streams_and_passes_and_limited(command, in_process, tmp_path):
    lines = [json.dumps({"text": text}) + "\n" for text in sentences(60, 0)]
    lines[20:20] = ["{\n"] * 9  # in every stream
    write_jsonl(tmp_path / "text/valid.jsonl", sentences(60, 2))
    (tmp_path / "text/train.jsonl").write_text("".join(lines))
    fields = {"dataset": tmp_path / "text", "max_steps": 30, "log_every": 10, "save_every": 5, "epochs": 9}
    in_process(command(tmp_path / "run", **fields))
    assert [r["bad_documents"] for r in records(tmp_path / "run", "train")][1:] == [9, 9]
    assert "9 documents could not be used" in (tmp_path / "run/report.md").read_text()

    with pytest.raises(ValueError, match=r"max_bad_documents=8, and 9 documents cannot be used"):
        in_process(command(tmp_path / "few", max_bad_documents=8, **fields))
    in_process(command(tmp_path / "few", max_bad_documents=9, resume=True, **fields))
    for name in ("train", "eval"):
        for one, other in zip(records(tmp_path / "few", name), records(tmp_path / "run", name), strict=True):
            assert one["loss"] == other["loss"]


def test_the_bar_tells_loss_sparsity_penalty_and_speed(command, in_process, tmp_path, capsys):
    line = command(tmp_path / "run", max_steps=6, methods={"l1": {"boundaries": [1.0], "targets": [1.0]}})
    line[line.index("--no-progress")] = "--progress"
    in_process(line)
    shown = capsys.readouterr().err
    last = shown[shown.rindex("training: 100%") :]
    train = records(tmp_path / "run", "train")[-1]
    for said in (
        f"loss={train['loss']:.3f}",
        f"sparsity={train['sparsity']:.1%}",
        f"l1={train['l1']:.3g}",
        f"tok/s={train['tokens_per_second']:,.0f}",
        "<00:00",  # what is left
    ):
        assert said in last


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_that_is_not_there_is_said_at_once(name, command, in_process, tmp_path):
    if find_spec(name) is not None:
        pytest.skip(f"{name} is installed")
    with pytest.raises(ValueError, match=rf"{name} is not installed; pip install {name}"):
        in_process([*command(tmp_path / "run"), "--trackers", name])
    assert not (tmp_path / "run").exists()


def test_an_unknown_tracker_is_refused(command, in_process, tmp_path, capsys):
    with pytest.raises(SystemExit):
        in_process([*command(tmp_path / "run"), "--trackers", "abacus"])
    assert "trackers='abacus' cannot be used: choose from wandb, trackio" in capsys.readouterr().err


@pytest.mark.slow
def test_wandb_gets_the_numbers_and_a_resumed_run_goes_on_in_the_same(command, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    output = tmp_path / "run"
    fields = {"max_steps": 4, "log_every": 2, "eval_every": 0, "trackers": ["wandb"]}
    run(command(output, **fields))
    number = (output / "trackers.id").read_text().strip()
    (written,) = (output / "wandb").glob(f"offline-run-*/run-{number}.wandb")
    content = written.read_bytes()
    for tag in (b"train/loss", b"train/layers/model.layers.0.mlp", b"eval/dead", b"learning_rate"):
        assert tag in content
    run(command(output, resume=True, **fields))
    assert (output / "trackers.id").read_text().strip() == number
    assert {path.name for path in (output / "wandb").glob("offline-run-*/*.wandb")} == {written.name}


@pytest.mark.slow
def test_trackio_gets_the_numbers(command, tmp_path, monkeypatch):
    pytest.importorskip("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    run(command(tmp_path / "run", max_steps=4, eval_every=0, trackers=["trackio"]))
    content = b"".join(path.read_bytes() for path in (tmp_path / "trackio").rglob("*.db*"))
    assert b"train/loss" in content
