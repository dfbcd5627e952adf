"""Methods in whole runs: what they keep in a checkpoint, what they leave in the model, what they reach."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from run_log import read_log
from transformers import AutoModelForCausalLM

import hf_sparse
from support.many import free_port
from support.runs import run

STATEFUL = {
    "max_steps": 12,
    "save_every": 7,
    "log_every": 1,
    "methods": {
        "target_sparsity": {"sparsity": 0.97, "by": 0.7, "lever": "l1"},
        "revival": {"window": 2, "std": 1.0},
        "threshold_shift": {"threshold": 0.05},
    },
}


def records(output: Path, kind: str) -> list[dict[str, Any]]:
    return [record for record in read_log(output / "log.jsonl") if record["kind"] == kind]


def same(a: Path, b: Path) -> None:
    for name in ("final/model.safetensors", "final/config.json"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    logs = [read_log(output / "log.jsonl")[1:] for output in (a, b)]
    for log in logs:
        for record in log:
            for name in ("tokens_per_second", "data_wait"):
                record.pop(name, None)
    assert logs[0] == logs[1]


@pytest.fixture(scope="module")
def whole(command, in_process, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("stateful") / "run"
    in_process(command(output, **STATEFUL))
    return output


def test_a_resumed_run_knows_what_its_methods_knew(whole, command, in_process, tmp_path, capsys) -> None:
    output = tmp_path / "run"
    shutil.copytree(whole, output)
    shutil.rmtree(output / "checkpoints/step-00000012")
    in_process(command(output, resume=True, **STATEFUL))
    assert "step-00000007" in capsys.readouterr().out
    same(output, whole)
    train = records(whole, "train")
    assert train[7]["dead_neurons"] > 0  # of updates 7, after which it was resumed, and 8
    assert train[-1]["target_coefficient"] > train[7]["target_coefficient"] > train[0]["target_coefficient"]


def test_the_shifted_model_is_the_one_that_is_evaluated_last_and_saved(
    whole, command, in_process, tmp_path
) -> None:
    last = records(whole, "eval")[-1]
    model = AutoModelForCausalLM.from_pretrained(whole / "final", dtype=torch.float32)
    assert hf_sparse.inspect(model).config == hf_sparse.SparsityConfig.read("fatrelu", threshold=0.05)
    without = {**STATEFUL["methods"]}
    del without["threshold_shift"]
    in_process(command(tmp_path / "run", **{**STATEFUL, "methods": without}))
    plain = records(tmp_path / "run", "eval")
    assert [e["loss"] for e in plain[:-1]] == [e["loss"] for e in records(whole, "eval")[:-1]]
    assert last["sparsity"] > plain[-1]["sparsity"]
    weights = (AutoModelForCausalLM.from_pretrained(tmp_path / "run/final"), model)
    assert all(torch.equal(*pair) for pair in zip(*(one.parameters() for one in weights), strict=True))


def test_a_finished_run_that_is_continued_is_saved_shifted(whole, command, in_process, tmp_path) -> None:
    output = tmp_path / "run"
    shutil.copytree(whole, output)
    in_process(command(output, resume=True, **STATEFUL))
    same(output, whole)


@pytest.mark.slow
def test_two_processes_raise_thresholds_as_one_does(command, in_process, tmp_path) -> None:
    fields = {**STATEFUL, "methods": {"target_sparsity": {"sparsity": 0.9, "by": 0.7}}}
    in_process(command(tmp_path / "one", **fields))
    run(command(tmp_path / "two", processes=2, port=free_port(), **{**fields, "micro_batch": 2}))
    for one, two in zip(*(records(tmp_path / name, "train") for name in ("one", "two")), strict=True):
        for name in ("loss", "target_threshold", "training_sparsity"):
            assert two[name] == pytest.approx(one[name], rel=2e-4, abs=1e-6), (name, one["step"])
        # Of the last batch alone: a thousandth is six pairs of token and neuron.
        assert two["sparsity"] == pytest.approx(one["sparsity"], abs=1e-3), one["step"]
    assert one["sparsity"] == pytest.approx(0.9, abs=0.05)


@pytest.mark.slow
def test_two_processes_steer_as_one_does(whole, command, tmp_path) -> None:
    run(command(tmp_path / "run", processes=2, port=free_port(), **{**STATEFUL, "micro_batch": 2}))
    for one, two in zip(records(whole, "train"), records(tmp_path / "run", "train"), strict=True):
        for name in ("loss", "target_l1", "target_coefficient", "training_sparsity", "dead_neurons"):
            assert two[name] == pytest.approx(one[name], rel=2e-4, abs=1e-6), (name, one["step"])


REAL = {"sequence_length": 32, "learning_rate": 2e-3, "shuffle_buffer": 50, "save_every": 1000}


@pytest.mark.slow
@pytest.mark.parametrize("lever", ["threshold", "l1"])
def test_a_stated_sparsity_is_reached_on_a_real_llama(lever, assets, command, in_process, tmp_path) -> None:
    sparsity = 0.8
    fields = {"model": assets / "stories260K", "dataset": assets / "c4", **REAL, "eval_every": 0}
    methods = {"target_sparsity": {"sparsity": sparsity, "lever": lever}}
    in_process(command(tmp_path / "run", **fields, max_steps=250, eval_tokens=20480, methods=methods))
    assert records(tmp_path / "run", "eval")[-1]["sparsity"] == pytest.approx(sparsity, abs=0.01)
    held = [r["training_sparsity"] for r in records(tmp_path / "run", "train") if r["step"] > 175]
    assert sum(held) / len(held) == pytest.approx(sparsity, abs=0.015)


@pytest.mark.slow
@pytest.mark.parametrize(("lever", "least"), [("threshold", 0.65), ("l1", 0.53)])
def test_a_budget_in_perplexity_is_spent_and_kept_on_a_real_llama(
    lever, least, assets, command, in_process, tmp_path
) -> None:
    fields = {"model": assets / "stories260K", "dataset": assets / "c4", **REAL, "eval_every": 10}
    budget = {"perplexity": 20.0, "dense_perplexity": 32.0, "by": 0.6, "lever": lever}
    methods = {"target_sparsity": budget}
    in_process(command(tmp_path / "run", **fields, max_steps=250, eval_tokens=5120, methods=methods))
    found = records(tmp_path / "run", "eval")
    assert found[0]["perplexity"] > 38.4  # ReLU alone, before it is trained, is not within the budget
    assert found[-1]["perplexity"] <= 38.4
    assert found[-1]["sparsity"] > least  # ReLU alone gives 0.48
