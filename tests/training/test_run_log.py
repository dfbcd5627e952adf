from __future__ import annotations

import json
import subprocess
import sys

import pytest
from run_log import RunLog, read_log

from support.runs import TRAINING, environment, run


def steps(folder) -> list[int]:
    return [record["step"] for record in read_log(folder / "log.jsonl")]


def write(folder, numbers, **arguments) -> None:
    log = RunLog(folder, main=True, tensorboard=False, **arguments)
    for step in numbers:
        log.write("train", step, {"loss": float(step)})
    log.close()


def test_a_continued_log_drops_what_came_after_the_checkpoint_and_a_line_cut_short(tmp_path):
    write(tmp_path, [0, 2, 4, 6])
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    assert steps(tmp_path) == [0, 2, 4, 6]
    write(tmp_path, [6, 8], after_step=4)
    assert steps(tmp_path) == [0, 2, 4, 6, 8]


def test_a_new_run_starts_a_new_log(tmp_path):
    write(tmp_path, [0, 2])
    write(tmp_path, [0])
    assert steps(tmp_path) == [0]


def test_other_processes_write_nothing(tmp_path):
    log = RunLog(tmp_path / "run", main=False, tensorboard=True)
    log.write("train", 1, {"loss": 1.0})
    log.close()
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_runs_are_compared(command, in_process, tmp_path):
    for name, patch in (("dense", "none"), ("sparse", "relu")):
        in_process(command(tmp_path / name, patch=patch))
    script = [sys.executable, str(TRAINING / "compare.py")]
    result = tmp_path / "out" / "result.json"
    printed = run([*script, str(tmp_path / "dense"), str(tmp_path / "sparse"), "--json", str(result)])
    assert "patch: dense none; sparse relu" in printed
    dense, sparse = json.loads(result.read_text())["runs"]
    assert dense["tokens"] == sparse["tokens"] == 12 * 128
    assert dense["evaluations"][-1]["sparsity"] == 0 < sparse["evaluations"][-1]["sparsity"]
    assert f"{sparse['evaluations'][-1]['perplexity']:.3f}" in printed
    assert printed.count("original model") == 1

    (tmp_path / "sparse/log.jsonl").write_text(
        "".join((tmp_path / "sparse/log.jsonl").read_text().splitlines(keepends=True)[:-1])
    )
    failed = subprocess.run(
        [*script, str(tmp_path / "sparse")], capture_output=True, text=True, env=environment()
    )
    assert failed.returncode == 1
    assert "not finished" in failed.stderr
