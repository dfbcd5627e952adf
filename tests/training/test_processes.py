"""Two processes (gloo) against one: the same global batches, the same loss curve."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path

import pytest
import torch
from run_log import read_log
from safetensors.torch import load_file

from support.runs import run

FIELDS = {
    "max_steps": 30,
    "micro_batch": 2,
    "log_every": 1,
    "eval_every": 10,
    "save_every": 15,
    "eval_tokens": 336,  # 21 sequences: the processes get different numbers
    "methods": {"l1": {"boundaries": [0.5, 1.0], "targets": [0.5, 2.0]}},
}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def curves(output: Path) -> dict[str, torch.Tensor]:
    records = read_log(output / "log.jsonl")
    found = {}
    for kind, name in (("train", "loss"), ("train", "l1"), ("train", "gradient_norm"), ("eval", "loss")):
        values = [record[name] for record in records if record["kind"] == kind]
        found[f"{kind} {name}"] = torch.tensor(values, dtype=torch.float64)
    return found


def same_curves(a: Path, b: Path) -> None:
    for (name, one), other in zip(curves(a).items(), curves(b).values(), strict=True):
        assert len(one) == len(other) > 3, name
        # Rounding of float32 sums in another order, carried through 30 updates.
        torch.testing.assert_close(other, one, rtol=2e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


@pytest.fixture(scope="module")
def one(command, in_process, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("one") / "run"
    in_process(command(output, **FIELDS))
    return output


@pytest.fixture(scope="module")
def two(command, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("two") / "run"
    run(command(output, processes=2, port=free_port(), **FIELDS))
    return output


@pytest.mark.slow
def test_two_processes_give_the_loss_curve_of_one(one, two):
    assert read_log(one / "log.jsonl")[0]["processes"] == 1
    assert read_log(two / "log.jsonl")[0]["processes"] == 2
    same_curves(one, two)
    weights, weights_2 = (load_file(run / "final/model.safetensors") for run in (one, two))
    assert weights.keys() == weights_2.keys()
    for name in weights:
        torch.testing.assert_close(weights_2[name], weights[name], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_run_of_two_processes_continues_in_one(one, two, command, in_process, tmp_path, capsys):
    """The middle checkpoint of the two-process run, continued by one process."""
    output = tmp_path / "continued"
    shutil.copytree(two, output)
    shutil.rmtree(output / "checkpoints/step-00000030")
    in_process(command(output, resume=True, **FIELDS))
    assert "step-00000015" in capsys.readouterr().out
    same_curves(one, output)
