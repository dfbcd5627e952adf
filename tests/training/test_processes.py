"""Several processes (gloo) that each hold the model against one: the same global batches and loss curve."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from run_log import read_log

from support.many import ALL_METHODS, FIELDS, free_port, same_curves, same_model, under_slurm
from support.runs import run

FIELDS = {
    **FIELDS,
    "methods": ALL_METHODS,
    "max_steps": 30,
    "eval_every": 10,
    "save_every": 15,
}

pytestmark = pytest.mark.slow


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


def processes(output: Path) -> int:
    return read_log(output / "log.jsonl")[0]["processes"]


def continued(ended: Path, output: Path) -> Path:
    """A copy of a run that goes on from its middle checkpoint."""
    shutil.copytree(ended, output)
    shutil.rmtree(output / "checkpoints/step-00000030")
    return output


def test_two_processes_give_the_loss_curve_of_one(one, two):
    assert (processes(one), processes(two)) == (1, 2)
    same_curves(one, two)
    same_model(one, two)


def test_a_run_of_two_processes_continues_in_one(one, two, command, in_process, tmp_path, capsys):
    output = continued(two, tmp_path / "continued")
    in_process(command(output, resume=True, **FIELDS))
    assert "step-00000015" in capsys.readouterr().out
    same_curves(one, output)


def test_a_run_of_one_process_continues_in_four(one, command, tmp_path):
    output = continued(one, tmp_path / "continued")
    said = run(command(output, processes=4, port=free_port(), resume=True, **FIELDS))
    assert "step-00000015" in said
    same_curves(one, output)
    same_model(one, output)


def test_two_machines_under_slurm_give_the_loss_curve_of_one(one, command, tmp_path):
    (tmp_path / "bin").mkdir()
    fields = {**FIELDS, "precision": "fp32", "data_streams": 8}
    under_slurm(command(tmp_path / "run", **fields), tmp_path / "bin")
    assert processes(tmp_path / "run") == 2
    same_curves(one, tmp_path / "run")
    same_model(one, tmp_path / "run")


def test_adapters_of_two_processes_are_those_of_one(command, in_process, tmp_path):
    fields = {**FIELDS, "max_steps": 12, "eval_every": 6, "lora": {"r": 4}}
    in_process(command(tmp_path / "one", **fields))
    run(command(tmp_path / "two", processes=2, port=free_port(), **fields))
    same_curves(tmp_path / "one", tmp_path / "two")
    same_model(tmp_path / "one", tmp_path / "two")
